"""The estimate of a reduction's work against what reductions took."""

import json
from pathlib import Path

import pytest

from ovref.reduce.cost import work_of

RESULTS = Path(__file__).parents[3] / "tests" / "benchmarks" / "results"
MEASURED = sorted(RESULTS.glob("reduce_partitioned_*x768.json"))


def estimated(report, most):
    """For texts whose embeddings are given."""
    return work_of(
        references=report["references"], nouns=report["nouns"],
        shards=report["references"] / report["shard"], visual=report["width"],
        textual=report["width"], noun_seconds=0.0, most=most,
    )  # fmt: skip


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_cpu_seconds_are_those_that_were_measured(path):
    report = json.loads(path.read_text())
    for side, most in (("undivided", None), ("partitioned", report["partition_references"])):
        if side in report:
            work = estimated(report, most)
            found = work.worker_seconds + work.driver_seconds
            assert found == pytest.approx(report[side]["cpu_s"], rel=0.3), side


def test_work_grows_with_the_references_and_requests_faster():
    small, large = (
        work_of(references=n, nouns=100_000, shards=n / 1000, visual=512, textual=512,
                noun_seconds=0.01, most=1_000_000)
        for n in (1e8, 1e9)
    )  # fmt: skip
    assert large.worker_seconds == pytest.approx(10 * small.worker_seconds, rel=0.1)
    # Each partition reads a part of each group of shards.
    assert 10 * small.requests < large.requests < 100 * small.requests
