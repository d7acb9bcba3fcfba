"""What is counted for mask AP: overlapping instances where a segmenter gives them."""

from dataclasses import replace

import numpy as np

from ovref.evaluation.counting import TABLES, counts_of
from ovref.evaluation.datasets import open_scenes
from ovref.evaluation.predictions import Prediction
from ovref_inference.segmenters.instances import Instances


def test_instances_count_for_average_precision_and_not_for_pq():
    data = open_scenes("test", 8)
    example = next(
        each for each in data if any(data.things[v] for v in each.panoptic.labels.values())
    )
    truth = example.panoptic
    found = Prediction(
        labels_hw=example.label_hw, panoptic=truth, scores=dict.fromkeys(truth.labels, 0.5)
    )
    things = [id_ for id_, label in truth.labels.items() if data.things[label]]
    masks_nhw = np.stack([truth.ids_hw == id_ for id_ in things])
    labels = np.array([truth.labels[id_] for id_ in things])
    # Each mask a second time, as another thing of lower score.
    other = next(i for i, thing in enumerate(data.things) if thing and i not in labels)
    twice = Instances(
        masks_nhw=np.concatenate([masks_nhw, masks_nhw]),
        labels=np.concatenate([labels, np.full(len(labels), other)]),
        scores=np.repeat(np.float32([0.9, 0.1]), len(labels)),
    )
    plain = counts_of(example, found, data)
    overlapping = counts_of(example, replace(found, instances=twice), data)
    for name in ("confusion", "segments"):
        np.testing.assert_array_equal(plain[name], overlapping[name])
    columns = TABLES["detections"][1][1:]  # without the row's
    class_at, right_at = columns.index("class"), columns.index("right")
    assert len(plain["detections"]) == len(things)
    assert len(overlapping["detections"]) == 2 * len(things)
    wrong = overlapping["detections"][:, class_at] == other
    assert (overlapping["detections"][wrong, right_at] == 0).all()
    assert (overlapping["detections"][~wrong, right_at] > 0).all()
