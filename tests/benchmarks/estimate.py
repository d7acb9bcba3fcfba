"""The estimate of a dry run against the build that it is of, on the miniature.

    OMP_NUM_THREADS=1 python tests/benchmarks/estimate.py [captions] [probe]

First the estimate, then the build, in this process. Pairs are [estimated, found]; seconds are of
the work inside shards, by the wall clock, so that a load that changes between the two shows in the
ratio. Writes results/estimate.json.
"""

import json
import sys
import tempfile
from pathlib import Path

from ovref_pipelines import recipe
from ovref_pipelines.estimate import estimate, text
from ovref_pipelines.recipe import BuildConfig

from ovref.config import load

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
        summary = recipe.build(config, print)
        sizes = {
            step.step: sum(p.stat().st_size for p in Path(scratch, "out", step.step).glob("*-*"))
            for step in summary.steps
        }
        collection = sum(p.stat().st_size for p in Path(scratch, "out", "collection").iterdir())
    estimates = {step.step: step for step in found.steps}
    report = {"captions": captions, "probe": probe, "steps": {}}
    for step in summary.steps:
        guess = estimates[step.step]
        report["steps"][step.step] = {
            "records": [round(guess.records, 1), step.inputs],
            "seconds": [round(guess.seconds, 2), step.work_seconds],
            "bytes": [round(guess.stored), sizes[step.step]],
            "seconds_ratio": round(guess.seconds / step.work_seconds, 3),
            "bytes_ratio": round(guess.stored / sizes[step.step], 3),
        }
    report["collection_bytes"] = [round(found.collection_bytes), collection]
    report["seconds_ratio"] = round(
        sum(estimates[step.step].seconds for step in summary.steps)
        / sum(step.work_seconds for step in summary.steps), 3,
    )  # fmt: skip
    path = Path(__file__).parent / "results" / "estimate.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
