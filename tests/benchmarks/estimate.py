"""The estimate of a dry run against the build that it is of, on the miniature.

    OMP_NUM_THREADS=1 python tests/benchmarks/estimate.py [captions] [probe]

First the estimate, then the build, in this process. Pairs are [estimated, found]; seconds are of
the work inside shards and of the whole reduction, by the wall clock, so that a load that changes
between the two shows in the ratio: run it on a machine that does nothing else.
Writes results/estimate.json.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from machine import commit
from ovref.config import load
from ovref_pipelines import recipe
from ovref_pipelines.output import COLLECTION
from ovref_pipelines.recipe import BuildConfig
from ovref_pipelines.verbs.estimate import estimate, text

ROOT = Path(__file__).parents[2]


def main(captions: int = 48, probe: int = 16) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = load(BuildConfig, ROOT / "configs" / "miniature.yaml", [
            f"corpus.path={ROOT / 'configs' / 'miniature_captions.txt'}",
            f"corpus.limit={captions}", "shard_size=16", "synthesize.batch_size=8",
            "embed.batch_size=8", "engine.engine=local", "engine.workers=1",
            f"output={Path(scratch, 'out')}",
        ])  # fmt: skip
        found = estimate(config, probe)
        print(text(found))
        times: dict[str, float] = {}

        def say(message: str) -> None:
            print(message)
            times[" ".join(message.split()[:2])] = time.monotonic()

        summary = recipe.build(config, say)
        names = [*(step.step for step in summary.steps), COLLECTION]
        sizes = {
            name: sum(
                path.stat().st_size
                for path in Path(scratch, "out", name).iterdir()
                if name == COLLECTION or "-" in path.name
            )
            for name in names
        }
    seconds = {step.step: step.work_seconds for step in summary.steps}
    seconds[COLLECTION] = times["collection: done"] - times["collection: reducing"]
    records = {step.step: step.inputs for step in summary.steps}
    records[COLLECTION] = summary.collection["references"]
    guesses = {step.step: step for step in found.steps}
    report = {
        "captions": captions, "probe": probe, "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "steps": {},
    }  # fmt: skip
    for name in names:
        guess, work = guesses[name], guesses[name].seconds + guesses[name].alone_seconds
        report["steps"][name] = {
            "records": [round(guess.records, 1), records[name]],
            "seconds": [round(work, 2), round(seconds[name], 2)],
            "bytes": [round(guess.stored), sizes[name]],
            "seconds_ratio": round(work / seconds[name], 3),
            "bytes_ratio": round(guess.stored / sizes[name], 3),
        }
    pairs = [step["seconds"] for step in report["steps"].values()]
    report["seconds"] = [round(sum(each), 2) for each in zip(*pairs, strict=True)]
    report["seconds_ratio"] = round(report["seconds"][0] / report["seconds"][1], 3)
    path = Path(__file__).parent / "results" / "estimate.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
