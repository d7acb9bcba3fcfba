"""The way into the command `ovref`, also as `python -m ovref_pipelines`.

It imports next to nothing, so that Ctrl-C is answered by a sentence while the command's own modules
are still being imported.
"""

import os
import signal
from typing import Any


def _stop(_number: int, _frame: Any) -> None:
    os.write(2, b"ovref: stopped; nothing committed is lost, run the same command to resume\n")
    os._exit(130)


def main() -> int:
    """Runs the command and returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    from ovref_pipelines import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
