"""Compare the time of `clipkd --help` with that of importing typer and rich, which a command line like it must import.

    python benchmarks/help_time.py [--rounds 15]

Both sides are whole processes, interleaved.  The last line of stdout is one JSON document; the exit code is 5 if the
claim does not hold.
"""

import argparse
import statistics
import subprocess
import sys
import time

from claims import claim, finish

MAX_RATIO = 2.5


def time_process(command: list[str]) -> float:
    """Return the wall time of a process, in seconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    sides = {
        "clipkd --help": [sys.executable, "-m", "clipkd", "--help"],
        "import typer, rich.table": [sys.executable, "-c", "import typer, rich.table"],
    }
    for command in sides.values():  # once untimed: this fills the disk cache and compiles the bytecode
        time_process(command)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, command in sides.items():
            taken[name].append(time_process(command))
    medians = {name: statistics.median(samples) for name, samples in taken.items()}
    for name, median in medians.items():
        print(f"{name:<28} median {1000 * median:.0f} ms of {rounds}")
    ratio = medians["clipkd --help"] / medians["import typer, rich.table"]
    finish("help_time", [claim("clipkd --help over the imports alone, median", ratio, "ratio", "<=", MAX_RATIO)])


if __name__ == "__main__":
    main()
