"""Measures the papers' tables in small; first builds the collections that are missing.

    python tests/benchmarks/run_paper_tables.py --config configs/miniature_tables.yaml

Exit codes: 0 done; 1 shards of a build failed permanently; 2 something has to be mended first.
"""

import argparse
import os
import sys

from ovref.config import load
from ovref.errors import OvrefError
from paper_tables import tables
from paper_tables.builds import build_missing
from paper_tables.spec import TablesSpec


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, in YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        spec = load(TablesSpec, options.config, options.overrides)
        failed = build_missing(spec.builds, say)
        if failed:
            say(f"{failed} shards failed permanently; mend their cause and `ovref retry-failed`")
            return 1
        tables.make_tables(spec, say)
    except OvrefError as error:
        say(str(error))
        return 2
    print(f"written to {spec.output}: {', '.join(sorted(os.listdir(spec.output)))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
