"""Two runs: differences, intervals and what made them, against slow references."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovref.errors import InputError
from ovref.evaluation.compare import (
    accuracy_of_samples,
    bootstrap_times,
    compare,
    iou_of_samples,
    miou_of_samples,
    open_run,
    text,
)
from ovref.evaluation.evaluate import EvaluateSpec, evaluate
from ovref.evaluation.metrics_semantic import confusion, scores_of_counts, sparse_confusion
from ovref.evaluation.totals import overlaps_of
from ovref.records import ScoredImage

CLASSES = 4


@pytest.fixture
def maps():
    """Truth and the predictions of two rows, of images of other sizes; class 3 is rare."""
    rng = np.random.default_rng(5)
    found = []
    for side in (3, 5, 4, 2, 6):
        truth_hw = rng.choice([0, 1, 2, 2, -1], (side, 7))
        other_hw = rng.integers(0, 3, (side, 7))
        rows = [np.where(rng.random((side, 7)) < s, truth_hw, other_hw) for s in (0.7, 0.4)]
        found.append((truth_hw, [np.where(row == -1, 0, row) for row in rows]))
    found[3][0][0, 0] = 3
    return found


@pytest.fixture
def overlaps(maps):
    images = [
        ScoredImage(
            key=f"{number}",
            name=f"{number}",
            tables={
                "confusion": np.concatenate([
                    np.insert(sparse_confusion(truth_hw, row_hw, CLASSES), 0, place, axis=1)
                    for place, row_hw in enumerate(rows)
                ])
            },
        )
        for number, (truth_hw, rows) in enumerate(maps)
    ]  # fmt: skip
    return overlaps_of(images, [0, 1], CLASSES)


def test_resampled_data_sets_score_what_their_images_score(maps, overlaps):
    times_sn = bootstrap_times(len(maps), samples=20)
    assert (times_sn.sum(1) == len(maps)).all()
    for row, one in enumerate(overlaps):
        found = zip(
            iou_of_samples(one, times_sn),
            miou_of_samples(one, times_sn),
            accuracy_of_samples(one, times_sn),
            times_sn.astype(int),
            strict=True,
        )
        for iou, miou, accuracy, times in found:
            counts = sum(
                n * confusion(truth_hw, rows[row], CLASSES)
                for n, (truth_hw, rows) in zip(times, maps, strict=True)
            )
            scores = scores_of_counts(counts)
            np.testing.assert_allclose(iou, scores.iou)
            assert miou == pytest.approx(scores.miou)
            assert accuracy == pytest.approx(scores.pixel_accuracy)


def test_an_image_has_the_scores_that_it_has_alone(maps, overlaps):
    for row, one in enumerate(overlaps):
        alone = [scores_of_counts(confusion(t, rows[row], CLASSES)) for t, rows in maps]
        np.testing.assert_allclose(one.iou_of_images(), [scores.miou for scores in alone])
        np.testing.assert_allclose(
            one.accuracy_of_images(), [scores.pixel_accuracy for scores in alone]
        )


@pytest.fixture(scope="module")
def spec(collection_url, tmp_path_factory):
    return EvaluateSpec(
        collection=collection_url,
        output=str(tmp_path_factory.mktemp("run") / "out"),
        scenes=6,
        rows=("fossil_no_proposals", "text_only"),
        shard_size=4,
        pictures=0,
    )


@pytest.fixture(scope="module")
def result(spec):
    return evaluate(spec, lambda line: None, device="cpu")


def test_two_rows_of_a_run_are_compared(spec, result, tmp_path):
    runs = [open_run(spec.output), open_run(spec.output, "text only")]
    found = compare(*runs, tmp_path, pictures=2)
    mious = [row["miou"] for row in result["rows"]]
    assert [found[one]["miou"] for one in ("first", "second")] == mious
    miou = found["differences"]["miou"]
    assert miou["value"] == pytest.approx(mious[0] - mious[1], abs=1e-4)
    assert miou["low"] < miou["value"] < miou["high"]
    assert compare(*runs[::-1], tmp_path / "other", pictures=0)["differences"]["miou"][
        "value"
    ] == pytest.approx(-miou["value"])
    own = {row["class"]: row["iou"] for row in result["per_class"]}
    for row in found["per_class"]:
        assert row["first"] == own[row["class"]]
        if None not in (row["first"], row["second"]):
            assert row["difference"] == pytest.approx(row["first"] - row["second"], abs=2e-4)
    # The effect of an image is what the difference loses without it.
    one = found["images"][0]
    assert one["effect"] == max(row["effect"] for row in found["images"])
    assert len(found["images"]) == 6
    page = text(found)
    assert "FOSSIL without proposals of" in page and "95 % interval" in page
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    assert "## Images that made the difference" in (tmp_path / "compare.md").read_text()
    for name in ("gained", "lost"):
        signs = [row for row in found["images"] if (row["effect"] > 0) == (name == "gained")]
        if signs:
            with Image.open(tmp_path / f"{name}.png") as picture:
                assert picture.format == "PNG"
    assert (tmp_path / "images.csv").read_text().startswith("image,first,second,effect\n")


def test_a_run_compared_with_itself_differs_in_nothing(spec, result, tmp_path):
    found = compare(open_run(spec.output), open_run(spec.output), tmp_path)
    assert set(found["differences"]["miou"].values()) == {0.0}
    assert not any(row["difference"] for row in found["per_class"])
    assert not list(tmp_path.glob("*.png"))
    before = Path(spec.output, "images.csv").read_bytes()
    with pytest.raises(InputError, match="compare into another folder"):
        compare(open_run(spec.output), open_run(spec.output), Path(spec.output))
    assert Path(spec.output, "images.csv").read_bytes() == before


def test_runs_of_other_images_are_refused(spec, result, tmp_path):
    other = replace(spec, scenes=2, output=str(tmp_path / "out"), rows=("text_only",))
    evaluate(other, lambda line: None, device="cpu")
    with pytest.raises(InputError, match="their images differ: miniature test, 6 scenes"):
        compare(open_run(spec.output), open_run(other.output), tmp_path / "compared")
    with pytest.raises(InputError, match="has no row 'FOSSIL'; its rows are FOSSIL without"):
        open_run(spec.output, "FOSSIL")
    with pytest.raises(InputError, match=r"nowhere is not a finished evaluation: cannot read"):
        open_run(str(tmp_path / "nowhere"))
