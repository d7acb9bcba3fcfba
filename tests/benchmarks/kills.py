"""Builds that are killed at random moments, again and again, until so many kills have been made.

    python tests/benchmarks/kills.py [--kills 200] [--seed 0] [--minutes 60] [--miniature]

Each build is killed with SIGKILL up to `PER_BUILD` times, then finished. The moments are uniform
over 0.6 of the CPU time that an undisturbed build takes, counted from each start. A build counts as
good if every file of every step and of the collection is byte for byte that of an undisturbed
build, and every input of every step has exactly one answer. Stages are cheap fakes, or the
miniature's with `--miniature`.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "pipelines"))

from recipe_fakes import (  # noqa: E402 (found by the path above)
    answered_once,
    content_of,
    fake_build,
    finish,
    kill_at_random,
    run_fake_build,
    run_miniature_build,
    small_miniature_build,
)

PER_BUILD = 8
CAPTIONS, SHARD_SIZE = 24, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="gives up after so long")
    parser.add_argument("--miniature", action="store_true", help="with the miniature's models")
    parser.add_argument("--output", help="JSON file of results")
    options = parser.parse_args()

    rng, started = random.Random(options.seed), time.monotonic()
    job = run_miniature_build if options.miniature else run_fake_build
    result = {"kills": 0, "builds": 0, "identical": 0, "answered_once": 0, "interrupted": Counter()}
    with tempfile.TemporaryDirectory() as scratch:

        def build(name: str):
            folder = Path(scratch, name)
            folder.mkdir()
            if options.miniature:
                return small_miniature_build(folder)
            return fake_build(folder, CAPTIONS, SHARD_SIZE)

        undisturbed = build("undisturbed")
        seconds = finish(undisturbed, job)
        wanted = content_of(undisturbed)
        while result["kills"] < options.kills:
            if time.monotonic() - started > 60 * options.minutes:
                break
            config = build(f"build{result['builds']}")
            left = min(PER_BUILD, options.kills - result["kills"])
            killed = kill_at_random(config, rng, 0.6 * seconds, left, job)
            result["kills"] += len(killed)
            result["interrupted"].update(killed)
            result["builds"] += 1
            made = content_of(config)
            result["identical"] += made == wanted
            if made != wanted:
                names = {name for name in made | wanted if made.get(name) != wanted.get(name)}
                print(f"build {result['builds']} differs in {sorted(names)}", flush=True)
            result["answered_once"] += answered_once(config)
            print(json.dumps(result), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    result |= {
        "stages": "miniature" if options.miniature else "fakes",
        "files": len(wanted),
        "seed": options.seed,
        "cpu_seconds_of_a_build": round(seconds, 2),
        "commit": commit,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(result, indent=1))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    good = result["builds"] == result["identical"] == result["answered_once"]
    return 0 if good and result["kills"] >= options.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
