"""A worker's images a second: `python tests/benchmarks/run_bench.py key=value ...`; see `bench`."""

import sys

from bench.limits import BenchSpec
from bench.report import run
from ovref.config import load
from ovref.errors import OvrefError

if __name__ == "__main__":
    try:
        run(load(BenchSpec, None, sys.argv[1:]))
    except OvrefError as error:
        raise SystemExit(f"run_bench: {error}") from error
