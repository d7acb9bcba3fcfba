"""All metrics agree with their modules; intervals tell a significant difference from chance."""

from dataclasses import replace

import numpy as np
import pytest

from ovref.evaluation.metrics_panoptic import PanopticQuality
from ovref.evaluation.metrics_semantic import confusion, scores_of_counts
from ovref.evaluation.predictions import Prediction
from paper_tables.datasets import miniature_scenes, with_unseen
from paper_tables.predictions import (
    METRICS,
    difference,
    evaluate_predictions,
    prediction_of_pixels,
    single_metric,
)


@pytest.fixture(scope="module")
def data():
    return with_unseen(miniature_scenes("validation", 12), ["sky", "kite", "boat"])


def truth(data):
    return [
        Prediction(
            labels_hw=label_hw, panoptic=panoptic, scores=dict.fromkeys(panoptic.labels, 1.0)
        )
        for label_hw, panoptic in zip(data.labels, data.panoptic, strict=True)
    ]


def damaged(data, share, seed):
    """The truth with whole segments renamed at random."""
    rng = np.random.default_rng(seed)
    found = []
    for panoptic in data.panoptic:
        labels = {
            i: int(rng.integers(len(data.classes))) if rng.random() < share else label
            for i, label in panoptic.labels.items()
        }
        names = np.array([0, *labels.values()])
        found.append(
            Prediction(
                labels_hw=names[panoptic.ids_hw],
                panoptic=replace(panoptic, labels=labels),
                scores={i: float(rng.random()) for i in labels},
            )
        )
    return found


def test_the_truth_is_perfect_in_every_metric(data):
    found = evaluate_predictions(data, truth(data))
    assert set(found.metrics) == set(METRICS)
    assert found.metrics == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_metrics_are_of_the_whole_data_set_not_means_of_images(data):
    predictions = damaged(data, 0.4, 0)
    found = evaluate_predictions(data, predictions)
    quality = PanopticQuality(data.things)
    for panoptic, predicted in zip(data.panoptic, predictions, strict=True):
        quality.add(panoptic, predicted.panoptic)
    assert found.metrics["pq"] == pytest.approx(quality.scores().all.pq)
    right = sum(
        (p.labels_hw == label).sum() for p, label in zip(predictions, data.labels, strict=True)
    )
    assert found.metrics["pixel_accuracy"] == pytest.approx(right / (12 * 64 * 64))
    assert 0 < found.metrics["miou"] < 1 and 0 < found.metrics["hiou"] < 1


def test_what_a_data_set_lacks_is_not_evaluated(data):
    plain = replace(data, panoptic=None, things=None, seen=None)
    found = evaluate_predictions(plain, truth(data))
    assert set(found.metrics) == {"miou", "pixel_accuracy"}
    with pytest.raises(ValueError, match="PQ needs a data set with panoptic truth"):
        difference(found, found, "pq")
    with pytest.raises(ValueError, match="seen needs a data set with a split"):
        difference(found, found, "seen")


@pytest.mark.parametrize("metric", ["miou", "pq", "seen", "unseen"])
def test_a_large_difference_is_certain_and_none_is_none(data, metric):
    good, bad = (
        evaluate_predictions(data, damaged(data, 0.1, 1)),
        evaluate_predictions(data, damaged(data, 0.9, 2)),
    )
    found = difference(good, bad, metric)
    assert found.value == good.metrics[metric] - bad.metrics[metric]
    assert 0 < found.low < found.value < found.high
    back = difference(bad, good, metric)
    assert back.value == -found.value and (back.low, back.high) == pytest.approx(
        (-found.high, -found.low)
    )
    same = difference(good, good, metric)
    assert same.value == same.low == same.high == 0


@pytest.mark.parametrize("metric", ["miou", "pq"])
def test_two_equally_damaged_predictions_do_not_differ_for_certain(data, metric):
    found = difference(
        evaluate_predictions(data, damaged(data, 0.5, 3)),
        evaluate_predictions(data, damaged(data, 0.5, 4)),
        metric,
    )
    assert found.low < 0 < found.high


@pytest.mark.parametrize("metric", ["miou", "pq", "seen"])
def test_an_interval_is_made_of_the_metric_of_drawn_images(data, metric):
    """With one image there is one data set to draw, and it has the metric itself."""
    one = replace(data, images=data.images[:1], labels=data.labels[:1], panoptic=data.panoptic[:1])
    first, second = damaged(data, 0.0, 0)[:1], damaged(data, 1.0, 5)[:1]
    found = difference(evaluate_predictions(one, first), evaluate_predictions(one, second), metric)
    assert found.low == pytest.approx(found.value) and found.high == pytest.approx(found.value)


def test_one_metric_alone_is_the_same(data):
    predictions = damaged(data, 0.4, 0)
    found = evaluate_predictions(data, predictions)
    for metric in ("miou", "pq"):
        assert single_metric(data, predictions, metric) == found.metrics[metric]
    with pytest.raises(ValueError, match="metric must be miou or pq"):
        single_metric(data, predictions, "ap")
    with pytest.raises(ValueError, match="PQ needs a data set with panoptic truth"):
        single_metric(replace(data, panoptic=None), predictions, "pq")


def test_pixels_without_a_class_are_missed_and_nothing_else(data):
    """They count against the true class alone: as if a class without a truth were predicted."""
    perfect = truth(data)
    maps = [p.labels_hw.astype(int) for p in perfect]
    none = [
        replace(p, labels_hw=np.where(m < 7, -1, m)) for p, m in zip(perfect, maps, strict=True)
    ]
    found = evaluate_predictions(data, none)
    # One class more, which is in no truth, in place of "no class".
    more = len(data.classes) + 1
    expected = scores_of_counts(
        sum(
            confusion(label_hw, np.where(p.labels_hw < 0, more - 1, label_hw).astype(int), more)
            for label_hw, p in zip(data.labels, none, strict=True)
        )
    )
    np.testing.assert_allclose(found.per_class_iou, expected.iou[:-1])
    assert found.metrics["miou"] == pytest.approx(np.nanmean(expected.iou[:-1]))
    assert found.metrics["pixel_accuracy"] == pytest.approx(expected.pixel_accuracy)
    assert difference(evaluate_predictions(data, perfect), found, "miou").low > 0


def test_pixels_become_segments_with_the_mean_score_of_their_class():
    labels_hw = np.array([[0, 1, 0], [0, 1, -1]])
    scores_chw = np.full((2, 2, 3), 0.1)
    scores_chw[0, :, 0], scores_chw[0, 0, 2], scores_chw[1, :, 1] = 0.5, 0.9, (0.6, 0.8)
    found = prediction_of_pixels(labels_hw, scores_chw, (True, False))
    np.testing.assert_array_equal(found.panoptic.ids_hw, [[1, 3, 2], [1, 3, 0]])
    assert found.panoptic.labels == {1: 0, 2: 0, 3: 1}
    assert found.scores == pytest.approx({1: 0.5, 2: 0.9, 3: 0.7})
    assert prediction_of_pixels(labels_hw, scores_chw, None).panoptic.labels == {1: 0, 2: 1}


def test_mistakes_are_refused(data):
    with pytest.raises(ValueError, match="11 predictions for 12 images"):
        evaluate_predictions(data, truth(data)[:-1])
    found = evaluate_predictions(data, truth(data))
    with pytest.raises(ValueError, match="metric must be miou, pq, seen or unseen, found 'ap'"):
        difference(found, found, "ap")
    other = replace(found, confusion=found.confusion[1:])
    with pytest.raises(ValueError, match="the same images"):
        difference(found, other, "miou")
    # One too many, as of a data set that counts its classes from 1: not a class, and not ignored.
    labels = (np.full_like(data.labels[0], len(data.classes)), *data.labels[1:])
    with pytest.raises(ValueError, match=f"truth holds label {len(data.classes)}, expected 0 to"):
        evaluate_predictions(replace(data, labels=labels), truth(data))
