"""Parameters are chosen one at a time, only for the better, and never on test scenes."""

from dataclasses import dataclass

import pytest
from ovref_inference.opencut import OpenCutConfig
from ovref_inference.segmenters import FossilConfig

from ovref.evaluation.evaluate import EvaluateSpec
from ovref.evaluation.tune import climb, tune


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


def test_climbing_takes_the_best_value_of_each_field():
    lines = []
    best = climb(
        Point(0), {"x": (0, 3, 5), "y": (1, 2)}, lambda p: -((p.x - 4) ** 2) - p.y, lines.append
    )
    # 3 and 5 are equally good: the first stays. No value of y is better than its own.
    assert best == Point(3, 0) and len(lines) == 4


def test_tuning_on_test_scenes_is_refused():
    with pytest.raises(ValueError, match="validation scenes, found split 'test'"):
        tune(EvaluateSpec(collection="x", output="y", split="test"))


def test_tuning_changes_parameters_to_offered_values_only(collection_url):
    start = EvaluateSpec(
        collection=collection_url,
        output="",
        split="validation",
        scenes=3,
        fossil=FossilConfig(n=4, k=2, windows=None),
        opencut=OpenCutConfig(taus=(0.3,), stages=1),
    )
    best = tune(
        start, {"stages": (1, 2)}, {"n": (4, 8)}, rounds=1, progress=lambda line: None, device="cpu"
    )
    assert best.fossil.n in (4, 8) and best.opencut.stages in (1, 2)
    assert best.fossil.k == 2 and best.opencut.taus == (0.3,) and best.scenes == 3
