"""A trained head in an evaluation: its labels are the segmenter's, its split is checked."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ovref.errors import InputError, MismatchError
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.compare import compare, open_run
from ovref.evaluation.counting import methods_of
from ovref.evaluation.evaluate import evaluate
from ovref.evaluation.metrics_semantic import confusion, scores_of_counts, split_scores
from ovref.evaluation.spec import EvaluateSpec
from ovref_inference import load_segmenter
from ovref_inference.errors import ModelError
from ovref_inference.models import resolve
from ovref_inference.segmenters import ClipRcConfig

UNSEEN = ("car", "mushroom", "balloon", "cup", "butterfly", "boat")


@pytest.fixture(scope="module")
def trained_head():
    """The miniature's."""
    return Path(resolve("miniature:clip_rc"))


@pytest.fixture(scope="module")
def spec(trained_head, tmp_path_factory):
    return EvaluateSpec(
        method="clip_rc",
        clip_rc=ClipRcConfig(weights=str(trained_head), windows=None),
        output=str(tmp_path_factory.mktemp("evaluation") / "out"),
        scenes=5,
        unseen=UNSEEN,
        pictures=0,
    )


@pytest.fixture(scope="module")
def result(spec):
    return evaluate(spec, lambda line: None, device="cpu")


def test_rows_are_counted_from_the_segmenters_labels(spec, result, trained_head):
    segmenter = load_segmenter(
        trained_head, "clip_rc", config=ClipRcConfig(windows=None), device="cpu"
    )
    data = spec.open_data()
    counts = np.zeros((27, 28), np.int64)
    for one in data:
        (found,) = segmenter.segment([one.image_hwc], data.class_names)
        counts += confusion(one.label_hw, found.labels_hw, 27)
    scores = scores_of_counts(counts)
    (row,) = result["rows"]
    assert row["miou"] == pytest.approx(scores.miou, abs=1e-4)
    split = split_scores(scores.iou, data.seen)
    assert row["hiou"] == pytest.approx(split.hiou, abs=1e-4)
    assert result["seen"] == list(data.seen) and result["seen"].count(False) == 6
    assert "miniature:clip" not in result["caption"] and result["collection"]["references"] == 0


def test_comparing_has_the_split_too(spec, result, tmp_path):
    other = replace(
        spec, output=str(tmp_path / "other"), clip_rc=replace(spec.clip_rc, seen_penalty=0.0)
    )
    changed = evaluate(other, lambda line: None, device="cpu")
    found = compare(open_run(spec.output), open_run(other.output), tmp_path / "both", 0)
    for name in ("miou", "pixel_accuracy", "seen", "unseen", "hiou"):
        wanted = result["rows"][0][name] - changed["rows"][0][name]
        assert found["differences"][name]["value"] == pytest.approx(wanted, abs=2e-4)
        assert found["first"][name] == pytest.approx(result["rows"][0][name], abs=1e-4)
    assert "hIoU %" in (tmp_path / "both/compare.md").read_text()


def test_a_protocols_penalty_takes_the_place_of_its_own(spec):
    with CachedModels("cpu") as models:
        method = methods_of(replace(spec, protocol="zs3"), spec.open_data(), models)
        assert method.segmenter.config.seen_penalty == 0.0
        assert methods_of(spec, spec.open_data(), models).segmenter.config.seen_penalty == 0.1
        image_hwc = np.full((40, 50, 3), 80, np.uint8)
        assert method.predict(None, image_hwc).labels_hw.shape == (40, 50)


def test_other_heads_and_splits_are_refused(spec, result, trained_head, tmp_path):
    split = replace(spec, unseen=("sky", "car"), output=str(tmp_path / "a"))
    with pytest.raises(InputError, match="was trained on masks of sky, which count as unseen"):
        evaluate(split, lambda line: None, device="cpu")
    gone = replace(spec, clip_rc=replace(spec.clip_rc, weights=str(tmp_path)))
    with pytest.raises(ModelError, match=r"cannot read clip_rc\.json"):
        evaluate(gone, lambda line: None, device="cpu")
    with pytest.raises(InputError, match=r"unseen classes \['dragon'\]"):
        replace(spec, unseen=("dragon",)).open_data()
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("clip_rc.json", "clip_rc.safetensors"):
        (copied / name).write_bytes((trained_head / name).read_bytes())
    same = replace(spec, clip_rc=replace(spec.clip_rc, weights=str(copied)))
    assert evaluate(same, lambda line: None, device="cpu")["rows"] == result["rows"]  # resumed
    tree = json.loads((copied / "clip_rc.json").read_text())
    tree["templates"] = ["a drawing of a {}"]
    (copied / "clip_rc.json").write_text(json.dumps(tree))
    with pytest.raises(MismatchError):
        evaluate(same, lambda line: None, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_rc": ClipRcConfig(windows=None)}, "give clip_rc.weights with method=clip_rc"),
        ({"method": "collection", "collection": "x"}, "give clip_rc.weights with method=clip_rc"),
        ({"collection": "x"}, "method=clip_rc has no collection"),
        ({"clip_rc": ClipRcConfig(weights="x")}, "clip_rc.windows must be null"),
        (
            {"clip_rc": ClipRcConfig(weights="x", windows=None, classes="prototypes")},
            "name the collection",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(spec, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(spec, **changes)
