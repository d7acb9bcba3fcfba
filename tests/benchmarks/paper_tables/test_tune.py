"""Parameters are chosen one at a time, only for the better, and never on test scenes."""

from dataclasses import dataclass, replace

import pytest

from ovref.evaluation.evaluate import EvaluateSpec
from ovref.evaluation.miniature import OPENCUT
from ovref_inference.proposers.opencut import OpenCutConfig
from ovref_inference.segmenters.fossil import FossilConfig
from paper_tables.tune import coordinate_search, tune


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


def test_climbing_takes_the_best_value_of_each_field():
    lines = []
    best = coordinate_search(
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
        opencut=replace(OPENCUT, cut=OpenCutConfig(taus=(0.3,), stages=1)),
    )
    found = tune(
        start,
        {"stages": (1, 2)},
        {"steps": (1, 2)},
        {"n": (4, 8)},
        rounds=1,
        progress=lambda line: None,
        device="cpu",
    )
    cut, crf = found.opencut.cut, found.opencut.crf
    assert found.fossil.n in (4, 8) and cut.stages in (1, 2) and crf.steps in (1, 2, 10)
    assert found.fossil.k == 2 and cut.taus == (0.3,) and found.scenes == 3
    assert crf.appearance_colour == OPENCUT.crf.appearance_colour


def test_tuning_needs_a_crf():
    opencut = replace(OPENCUT, crf=None)
    with pytest.raises(ValueError, match=r"opencut\.crf must be given"):
        tune(EvaluateSpec(collection="x", output="y", split="validation", opencut=opencut))
