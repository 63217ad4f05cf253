"""Run one step of benchmarks/gpu.py in this process: the function `main` of gpu_NAME.py.

    python -m gpu_step NAME --out DIR --scratch DIR --seconds S [--dry]

What a step cannot do is one line of the results, also if a package is missing that it imports first of all.
"""

import argparse
import importlib
import signal
import sys
import time
import traceback
from pathlib import Path

from gpu_results import Step

from toolchain.errors import one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    step = Step(given.name, given.dry, given.out, given.scratch, time.monotonic() + given.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what a step records at its end is still written
    try:
        importlib.import_module(f"gpu_{given.name}").main(step)
    except ModuleNotFoundError as error:
        traceback.print_exc()
        step.note(f"skipped: {error.name} is not installed")
    except Exception as error:
        traceback.print_exc()
        step.note(f"failed: {type(error).__name__}: {one_line(error)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
