"""The convolutional CLIP's training: labels of patches against its cells, and its optimiser."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from ovref.miniature.shapes import CLASSES, STUFF  # noqa: E402
from recipes.miniature.train_clip_convnext import (  # noqa: E402
    CUT,
    cut,
    region_features,
    region_loss,
    shares_of,
)
from recipes.miniature.training import Muon, fit, orthogonal  # noqa: E402


@pytest.fixture
def labels_nhw():
    """Stuff above stuff, and a thing of 5 x 5 patches in the first two of three scenes."""
    labels = np.zeros((3, 16, 16), np.uint8)
    labels[:, 8:] = 2
    labels[0, 10:15, 1:6] = len(STUFF) + 3
    labels[1, 2:7, 11:16] = len(STUFF)
    return labels


def test_cut_out_squares_keep_their_labels_and_hold_a_patch_of_a_thing(labels_nhw):
    pixels = torch.from_numpy(labels_nhw).repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = pixels[:, None].expand(-1, 3, -1, -1)
    places = set()
    for seed in range(20):
        found, labels = cut(images, labels_nhw, np.random.default_rng(seed))
        assert found.shape == (3, 3, 4 * CUT, 4 * CUT) and labels.shape == (3, CUT, CUT)
        np.testing.assert_array_equal(found[:, 0, ::4, ::4], labels)
        assert (labels[0] == len(STUFF) + 3).any() and (labels[1] == len(STUFF)).any()
        places.add(labels.tobytes())
    assert len(places) > 10


def test_shares_and_region_features_are_means_over_cells(labels_nhw):
    shares = shares_of(labels_nhw, 16)
    cells = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0))
    features, found = region_features(cells, shares)
    expected, classes = [], []
    for scene, labels in enumerate(labels_nhw):
        for label in range(len(CLASSES)):
            # 4 x 4 cells of 4 x 4 patches
            covered = (labels == label).reshape(4, 4, 4, 4).mean((1, 3)).reshape(16)
            np.testing.assert_allclose(shares[scene, label], covered, atol=1e-6)
            if covered.sum() >= 1:
                expected.append(covered @ cells[scene].double().numpy() / covered.sum())
                classes.append(label)
    assert found.tolist() == classes and len(STUFF) + 3 in classes
    np.testing.assert_allclose(features, np.stack(expected), atol=1e-5)


def test_region_loss_is_least_where_cells_are_the_nouns_they_show(labels_nhw):
    labels_nhw[:2] = 0
    labels_nhw[0, 8:, :8] = len(STUFF) + 3  # whole cells
    nouns = torch.eye(len(CLASSES))
    shares = shares_of(labels_nhw, 16)
    right, things = region_loss(shares.mT, lambda rows: rows, shares, nouns)
    wrong, none = region_loss(shares.mT.roll(1, 2), lambda rows: rows, shares, nouns)
    assert right < 0.1 < 5 < wrong and things == 1 and none == 0


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)])
def test_orthogonal_keeps_directions_and_evens_their_sizes(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ vt.T
    torch.testing.assert_close(found, torch.diag(found.diag()), atol=1e-4, rtol=0)
    assert found.diag().min() > 0.5 and found.diag().max() < 1.3


def test_a_training_with_muon_learns_and_resumes_to_the_same_weights(tmp_path):
    losses = []

    def trained(folder, stops_at=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))

        def loss_of(step, rng):
            if step == stops_at:
                raise KeyboardInterrupt
            x = torch.from_numpy(rng.normal(size=(32, 2, 4, 4)).astype(np.float32))
            loss = nn.functional.mse_loss(model(x), x.mean((2, 3)) @ torch.ones(2, 3))
            losses.append(loss.item())
            return loss

        fit("small", folder, model, loss_of, 40, rate=0.02, save_every=10, optimiser=Muon)
        return model.state_dict()

    whole = trained(tmp_path / "whole")
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "again", stops_at=25)
    torch.testing.assert_close(trained(tmp_path / "again"), whole, atol=0, rtol=0)
