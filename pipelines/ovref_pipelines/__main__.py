"""Entry point of the command `ovref` and of `python -m ovref_pipelines`.

It imports almost nothing, so that Ctrl-C gives a plain message even while the command's own modules
are being imported.
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
