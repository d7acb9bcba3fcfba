"""Mask AP against pycocotools, which is COCO's official evaluation."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovref.evaluation.metrics_ap import (
    AveragePrecision,
    TrueInstances,
    match_detections,
)
from ovref_inference.segmenters.instances import Instances

CLASSES = 3


def official(images):
    """(AP, AP50, AP75, per-class AP) of pycocotools; NaN where it says -1."""
    truths, found = [], []
    for image, (truth, detections) in enumerate(images, start=1):
        for mask, label, crowd in zip(truth.masks_nhw, truth.labels, truth.crowd, strict=True):
            coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": image,
                    "category_id": int(label) + 1,
                    "segmentation": coded,
                    "area": float(mask.sum()),
                    "bbox": rle.toBbox(coded).tolist(),
                    "iscrowd": int(crowd),
                }
            )
        for mask, label, score in zip(
            detections.masks_nhw, detections.labels, detections.scores, strict=True
        ):
            found.append(
                {
                    "image_id": image,
                    "category_id": int(label) + 1,
                    "segmentation": rle.encode(np.asfortranarray(mask.astype(np.uint8))),
                    "score": float(score),
                }
            )
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [
            dict(zip(("id", "height", "width"), (i, *true.masks_nhw.shape[1:]), strict=True))
            for i, (true, _) in enumerate(images, start=1)
        ],
        "annotations": truths,
        "categories": [{"id": c + 1, "name": str(c)} for c in range(CLASSES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluated = COCOeval(coco, coco.loadRes(found), "segm")
        evaluated.evaluate()
        evaluated.accumulate()
    # (thresholds, recalls, classes) of all areas and at most 100 detections.
    precision = evaluated.eval["precision"][:, :, :, 0, 2]
    precision = np.where(precision < 0, np.nan, precision)
    known = ~np.isnan(precision[0, 0])
    if not known.any():
        return math.nan, math.nan, math.nan, np.full(CLASSES, np.nan)
    known = precision[:, :, known]
    return known.mean(), known[0].mean(), known[5].mean(), precision.mean((0, 1))


def assert_official(images):
    evaluated = AveragePrecision(CLASSES)
    for pair in images:
        for matched in match_detections(*pair):
            evaluated.add_matched(matched)
    scores = evaluated.scores()
    ap, ap50, ap75, per_class = official(images)
    np.testing.assert_allclose(scores.per_class, per_class, rtol=1e-12)
    np.testing.assert_allclose((scores.ap, scores.ap50, scores.ap75), (ap, ap50, ap75), rtol=1e-12)
    return scores


def truth(masks, labels, crowd=None):
    return TrueInstances(
        masks_nhw=np.asarray(masks, dtype=bool),
        labels=np.array(labels, dtype=int),
        crowd=np.array(crowd or [False] * len(labels), dtype=bool),
    )


def detections(masks, labels, scores):
    return Instances(
        masks_nhw=np.asarray(masks, dtype=bool),
        labels=np.array(labels, dtype=int),
        scores=np.array(scores, dtype=float),
    )


def test_of_two_instances_overlapped_alike_the_last_is_taken():
    """A detection of both halves leaves the first half for the next detection, and not the last."""
    halves = np.zeros((2, 4, 8), bool)
    halves[0, :, :4] = halves[1, :, 4:] = True
    whole = halves.any(axis=0)
    for half, hits in ((0, 2), (1, 1)):
        found = detections([whole, halves[half]], [0, 0], [0.9, 0.8])
        scores = assert_official([(truth(halves, [0, 0]), found)])
        # At IoU 0.5 alone: of two instances both are found, or the better detection's half.
        assert scores.ap50 == pytest.approx(1 if hits == 2 else 51 / 101)


def random_image(rng, size=16):
    masks, labels = [], []
    for _ in range(rng.integers(0, 6)):
        mask = np.zeros((size, size), bool)
        y, x = rng.integers(0, size - 3, 2)
        mask[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = True
        masks.append(mask)
        labels.append(int(rng.integers(CLASSES - 1)))  # the last class has no truth
    crowd = [bool(rng.random() < 0.2) for _ in labels]
    found, names = [], []
    for mask, label in zip(masks, labels, strict=True):
        for _ in range(rng.integers(0, 3)):
            found.append(np.roll(mask, rng.integers(-1, 2, 2), (0, 1)))
            found[-1][rng.random((size, size)) < 0.02] ^= True
            names.append(label if rng.random() < 0.85 else int(rng.integers(CLASSES)))
    for _ in range(rng.integers(0, 3)):
        found.append(rng.random((size, size)) < rng.random())
        names.append(int(rng.integers(CLASSES)))
    scores = rng.integers(0, 8, len(found)) / 8  # with ties
    empty = np.zeros((0, size, size), bool)
    return (
        truth(masks if masks else empty, labels, crowd),
        detections(found if found else empty, names, scores),
    )


def test_random_data_sets_equal_the_official_evaluation():
    rng = np.random.default_rng(3)
    middle = 0
    for _ in range(30):
        images = [random_image(rng) for _ in range(rng.integers(2, 9))]
        middle += 0.05 < assert_official(images).ap < 0.95
    assert middle > 10  # the cases are neither all easy nor all hopeless


SQUARE = np.zeros((2, 8, 8), bool)
SQUARE[0, :4, :4] = True
SQUARE[1, 4:, 4:] = True
NONE = np.zeros((0, 8, 8), bool)


def test_a_perfect_result_scores_one():
    scores = assert_official([(truth(SQUARE, [0, 1]), detections(SQUARE, [0, 1], [0.3, 0.9]))])
    assert scores.ap == pytest.approx(1) and math.isnan(scores.per_class[2])


def test_no_detection_scores_zero():
    found = [
        (truth(SQUARE, [0, 0]), detections(NONE, [], [])),
        # pycocotools needs a detection somewhere: here one of another class.
        (truth(NONE, []), detections(SQUARE[:1], [1], [0.5])),
    ]
    assert assert_official(found).ap == 0


def test_no_truth_has_no_ap():
    assert math.isnan(assert_official([(truth(NONE, []), detections(SQUARE, [0, 1], [1, 1]))]).ap)


def test_a_second_detection_of_the_same_thing_is_wrong():
    twice = detections(SQUARE[[0, 0]], [0, 0], [0.9, 0.8])
    assert assert_official([(truth(SQUARE, [0, 0]), twice)]).ap == pytest.approx(51 / 101)


def test_a_crowd_takes_any_number_and_counts_none():
    images = [
        (
            truth([~SQUARE[0], SQUARE[0]], [0, 0], [True, False]),
            detections(SQUARE[[1, 1, 0]], [0, 0, 0], [0.9, 0.8, 0.7]),
        )
    ]
    assert assert_official(images).ap == pytest.approx(1)


def test_an_empty_mask_is_no_match_and_no_error():
    empty = np.zeros((1, 8, 8), bool)
    assert assert_official([(truth(empty, [0]), detections(empty, [0], [0.5]))]).ap == 0


def test_at_most_a_hundred_detections_an_image_and_class_are_judged():
    many = np.repeat(SQUARE[:1], 101, axis=0)
    many[100] = SQUARE[1]
    scores = np.append(np.full(100, 0.5), 0.1)
    images = [(truth(SQUARE, [0, 0]), detections(many, [0] * 101, scores))]
    assert assert_official(images).ap == pytest.approx(51 / 101)


def test_there_must_be_classes():
    with pytest.raises(ValueError, match="classes must be at least 1"):
        AveragePrecision(0)
