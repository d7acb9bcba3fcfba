"""The document of tables: honest verdicts, empty cells, reasons where the order is another."""

import json
import math

import numpy as np
import pytest

from ovref.evaluation.metrics_panoptic import panoptic_of_labels
from ovref.evaluation.predictions import Prediction
from paper_tables.datasets import miniature_scenes
from paper_tables.predictions import Evaluation, evaluate_predictions
from paper_tables.report import Ordering, markdown, table


@pytest.fixture(scope="module")
def rows():
    """Three segmenters that rename none, some and most of the pixels' classes."""
    data = miniature_scenes("validation", 10)

    def evaluated(share, seed):
        rng = np.random.default_rng(seed)
        predictions = []
        for label_hw in data.labels:
            names = np.arange(len(data.classes))
            wrong = rng.random(len(names)) < share
            names[wrong] = rng.permutation(names)[wrong]
            labels_hw = names[label_hw]
            panoptic = panoptic_of_labels(labels_hw, data.things)
            scores = dict.fromkeys(panoptic.labels, 1.0)
            predictions.append(Prediction(labels_hw=labels_hw, panoptic=panoptic, scores=scores))
        return evaluate_predictions(data, predictions)

    return {"good": evaluated(0.1, 0), "other": evaluated(0.5, 1), "like it": evaluated(0.5, 4)}


def ordering(better, worse, metric="miou"):
    return Ordering(
        key=f"{better}-{worse}", better=better, worse=worse, metric=metric, paper="3 above 2"
    )


def document(*tables):
    return {
        "title": "Tables",
        "caption": "Of small models.",
        "facts": ["Ten scenes."],
        "tables": list(tables),
        "pictures": {"Predictions": "predictions.png"},
    }


def test_verdicts_follow_the_intervals(rows):
    found = table(
        "t",
        "Title",
        "Paper, table 1",
        rows,
        ["miou", "pq"],
        [
            ordering("good", "other"),
            ordering("other", "good", "pq"),
            ordering("other", "like it"),
        ],
    )
    assert [one["verdict"] for one in found["orderings"]] == [
        "as in the paper",
        "the other way",
        "undecided",
    ]
    for one in found["orderings"]:
        assert one["low"] <= one["difference"] <= one["high"]
    assert found == json.loads(json.dumps(found, allow_nan=False))


def test_the_page_has_every_number_and_every_reason(rows):
    orderings = [ordering("good", "other"), ordering("other", "good"), ordering("other", "like it")]
    found = table("t", "Title", "Paper, table 1", rows, ["miou", "pq"], orderings, ["A note."])
    page = markdown(document(found), {"other-good": "Names are mixed up.", "good-other": "never"})
    for row in found["rows"]:
        assert row["name"] in page and f"{100 * row['miou']:.1f}" in page
    assert f"**{100 * found['rows'][0]['miou']:.1f}**" in page  # the best is marked
    assert "1 as in the paper, 1 undecided, 1 the other way" in page
    assert "- other above good, mIoU, the other way: Names are mixed up." in page
    assert "- other above like it, mIoU, undecided: Not explained." in page
    assert "never" not in page  # no reason is asked where the order is the paper's
    assert "A note." in page and "Ten scenes." in page and "(predictions.png)" in page
    assert "3 above 2" in page and "PQ %" in page


def test_what_is_not_defined_is_an_empty_cell():
    evaluated = Evaluation(
        metrics={"miou": 0.25, "ap": math.nan},
        per_class_iou=np.zeros(1),
        confusion=np.zeros((1, 1, 1)),
        ious=None,
        segments=None,
    )
    found = table("t", "T", "S", {"one": evaluated}, ["miou", "ap", "pq"])
    assert found["rows"] == [{"name": "one", "miou": 0.25, "ap": None, "pq": None}]
    assert "| one | 25.0 |  |  |" in markdown(document(found), {})


def test_an_ordering_of_rows_that_are_not_there_is_a_mistake(rows):
    with pytest.raises(KeyError, match="nobody"):
        table("t", "T", "S", rows, ["miou"], [ordering("nobody", "good")])
