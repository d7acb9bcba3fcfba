"""`python -m ovref.bench key=value ...`: `ovref bench` without Ray, from a checkout."""

import sys

from ovref.bench.limits import BenchSpec
from ovref.bench.report import run
from ovref.config import load
from ovref.errors import OvrefError

if __name__ == "__main__":
    try:
        run(load(BenchSpec, None, sys.argv[1:]))
    except OvrefError as error:
        raise SystemExit(f"ovref bench: {error}") from error
