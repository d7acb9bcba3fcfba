"""Builds that are killed at random moments, again and again, until so many kills have been made.

    python tests/benchmarks/kills.py [--kills 200] [--seed 0] [--minutes 60]
        [--miniature | --partition-references 5]

Here a build is one process (`engine=local`); `kills_ray.py` kills what a build on Ray is made of.

Each build is killed with SIGKILL up to `PER_BUILD` times, then finished. The moments are uniform
over 0.6 of the CPU time that an undisturbed build takes, counted from each start. A build counts as
good if every file of every step and of the collection is byte for byte that of an undisturbed
build, and every input of every step has exactly one answer. Stages are cheap fakes, or the
miniature's models with `--miniature`: the processes are forked from one that has imported the
libraries, and each loads the models that it needs. With `--partition-references` the fakes' build
makes a partitioned collection, from groups of `GROUP_ROWS` references. `--output` adds the run to a
list of runs.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from machine import commit

ROOT = Path(__file__).parents[2]
FAKES = str(ROOT / "tests" / "pipelines")
sys.path.insert(0, FAKES)
# For the server that processes are forked from, and against threads that would outlive a fork.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FAKES, os.environ.get("PYTHONPATH")]))
GROUP_ROWS = 8
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OVREF_FAKE_GROUP_ROWS=f"{GROUP_ROWS}")

from recipe_fakes import (  # noqa: E402 (found by the path above)
    PRELOADED,
    answered_once,
    content_of,
    fake_build,
    finish,
    kill_at_random,
    run_fake_build,
    run_miniature_build,
    small_miniature_build,
)

from ovref.reduce import ReduceSpec  # noqa: E402 (after the settings of the environment)

PER_BUILD = 8
LIBRARIES = (
    "ovref.models.tagger",
    "ovref.models.diffusion",
    "ovref_inference.encoders.load",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.dinov2.modeling_dinov2",
)
"""What the miniature's stages import; this takes longer than the build that is killed."""
CAPTIONS, SHARD_SIZE = 24, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="gives up after so long")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--miniature", action="store_true", help="with the miniature's models")
    add_partitions(kind)
    parser.add_argument("--output", help="JSON file of results")
    options = parser.parse_args()

    rng, started = random.Random(options.seed), time.monotonic()
    job = run_miniature_build if options.miniature else run_fake_build
    if options.miniature:
        PRELOADED.extend(LIBRARIES)
    result = {"kills": 0, "builds": 0, "identical": 0, "answered_once": 0, "interrupted": Counter()}
    with tempfile.TemporaryDirectory() as scratch:

        def build(name: str):
            folder = Path(scratch, name)
            folder.mkdir()
            if options.miniature:
                return small_miniature_build(folder)
            return fake_build(folder, CAPTIONS, SHARD_SIZE, reduce=reduction(options))

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
    result |= {
        "stages": "miniature" if options.miniature else "fakes",
        "engine": "local",
        **partitions_in(wanted, options),
        "files": len(wanted),
        "seed": options.seed,
        "per_build": PER_BUILD,
        "cpu_seconds_of_a_build": round(seconds, 2),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    record(result, options.output)
    good = result["builds"] == result["identical"] == result["answered_once"]
    return 0 if good and result["kills"] >= options.kills else 1


def add_partitions(parser: Any) -> None:
    """The option for a partitioned collection."""
    parser.add_argument(
        "--partition-references", type=int, metavar="N", help="a partitioned collection"
    )


def reduction(options: argparse.Namespace) -> ReduceSpec:
    """The kind of collection that the options ask for."""
    return ReduceSpec(partition_references=options.partition_references)


def partitions_in(content: dict[str, bytes], options: argparse.Namespace) -> dict[str, int]:
    """For the result: how the collection was divided, if it was."""
    if options.partition_references is None:
        return {}
    found = [path for path in content if path.endswith("references.parquet")]
    return {
        "partition_references": options.partition_references, "partitions": len(found),
        "group_rows": GROUP_ROWS,
    }  # fmt: skip


def record(result: dict[str, Any], output: str | None) -> None:
    """Prints a run, and adds it to the list of runs in `output`."""
    result = {"commit": commit(), **result}
    print(json.dumps(result, indent=1))
    if output:
        path = Path(output)
        runs = json.loads(path.read_text())["runs"] if path.exists() else []
        path.write_text(json.dumps({"runs": [*runs, result]}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
