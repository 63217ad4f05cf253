"""Call the `clipkd` command inside the process of a step, which has imported torch already."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import clipkd


def call_clipkd(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> Any:
    """Return the JSON document that a command with --json prints, or what it prints otherwise.

    Raises:
        RuntimeError: the exit code is not in `accept`; the message has the last line that the command wrote.
    """
    printed, said = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["clipkd", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            clipkd.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = before
        sys.stderr.write(said.getvalue())
    if code not in accept:
        lines = said.getvalue().strip().splitlines() or ["it wrote nothing"]
        raise RuntimeError(f"clipkd {' '.join(map(str, arguments))}: exit code {code}: {lines[-1]}")
    text = printed.getvalue()
    return json.loads(text) if "--json" in arguments and text.strip() else text
