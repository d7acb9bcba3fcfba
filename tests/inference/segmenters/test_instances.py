"""Instances of overlapping pairs of region and class, against a slow loop."""

import numpy as np
import pytest

from ovref_inference.segmenters.instances import instances
from ovref_inference.segmenters.regions import ScoredRegions


def slow_instances(regions, things, most):
    pairs = [
        (-float(score), row * len(things) + label, row, label)
        for row, scores in enumerate(regions.scores_nc)
        for label, score in enumerate(scores)
    ]
    for negative, _, row, label in sorted(pairs)[:most]:
        if not things[label]:
            continue
        inside = [float(a) for a in regions.mask_probs_nhw[row].ravel() if a > 0.5]
        sure = sum(inside) / len(inside) if inside else 0.0
        yield regions.mask_probs_nhw[row] > 0.5, label, -negative * sure


@pytest.mark.parametrize("most", [1, 7, 100])
def test_pairs_are_those_of_a_slow_loop(most):
    rng = np.random.default_rng(0)
    activations = rng.random((6, 5, 4), dtype=np.float32)
    activations[3] = 0.2  # no pixel is surely its own
    regions = ScoredRegions(
        mask_probs_nhw=activations, scores_nc=rng.random((6, 3), dtype=np.float32)
    )
    things = [True, False, True]
    found = instances(regions, things, most=most)
    expected = list(slow_instances(regions, things, most))
    assert found.labels.tolist() == [label for _, label, _ in expected]
    np.testing.assert_array_equal(found.masks_nhw, [mask for mask, _, _ in expected])
    np.testing.assert_allclose(found.scores, [score for _, _, score in expected], rtol=1e-5)


def test_no_regions_and_things_of_another_number():
    none = ScoredRegions(
        mask_probs_nhw=np.zeros((0, 5, 4), np.float32), scores_nc=np.zeros((0, 2), np.float32)
    )
    assert instances(none, [True, True]).masks_nhw.shape == (0, 5, 4)
    with pytest.raises(ValueError, match="one entry for each of 2 classes"):
        instances(none, [True])
