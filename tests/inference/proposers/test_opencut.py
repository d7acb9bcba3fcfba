"""OpenCut: eigenvectors against a dense solver, cuts of made-up keys, refinement by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from ovref_inference.proposers.opencut import (
    WEAK_LINK,
    OpenCutConfig,
    foreground_of,
    maskcut,
    opencut,
    refine,
    second_eigenvectors,
    upsample_masks,
)


def affinity(linked):
    return np.where(linked, 1.0, WEAK_LINK)


def links_of(w):
    """What `second_eigenvectors` takes for the weights W, with an axis for graphs."""
    return (torch.tensor(np.atleast_3d(w).reshape(-1, *w.shape[-2:])) - WEAK_LINK) / (1 - WEAK_LINK)


def random_links(n, rng):
    linked = rng.random((n, n)) < 0.2
    return linked | linked.T | np.eye(n, dtype=bool)


def feature_links(n, rng):
    features = rng.normal(size=(n, 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features @ features.T >= 0.2


def block_links(n, rng, blocks=3):
    block = rng.integers(0, blocks, n)
    return block[:, None] == block[None]


def two_rings(n, rng):
    """Two cycles without a link between them: small gaps inside, nearly none between the two."""
    node = np.arange(n)
    half = node < n // 2
    distance = np.abs(node[:, None] - node[None])
    near = (distance <= 1) | (distance == n // 2 - 1)
    return near & (half[:, None] == half[None])


def assert_second_solution(w, x, eigenvalue):
    """x and lambda solve eq. 2, and x lies in the eigenspace that the dense solver finds."""
    degree = w.sum(1)
    values, vectors = scipy.linalg.eigh(np.diag(degree) - w, np.diag(degree))
    np.testing.assert_allclose(eigenvalue, values[1], atol=1e-9)
    np.testing.assert_allclose(x @ (degree * x), 1, atol=1e-9)
    same = np.abs(values - values[1]) < 1e-9
    same[0] = False
    inside = vectors[:, same].T @ (degree * x)
    np.testing.assert_allclose(np.linalg.norm(inside), 1, atol=1e-5)


@pytest.mark.parametrize("links", [random_links, feature_links, block_links, two_rings])
@pytest.mark.parametrize("n", [2, 3, 5, 16, 33, 77, 256])
def test_eigenvector_matches_the_dense_solver(links, n):
    rng = np.random.default_rng(n)
    w_bnn = np.array([affinity(links(n, rng)) for _ in range(3)])
    x_bn, eigenvalues = second_eigenvectors(links_of(w_bnn))
    for w, x, eigenvalue in zip(w_bnn, x_bn.numpy(), eigenvalues.numpy(), strict=True):
        assert_second_solution(w, x, eigenvalue)


def test_eigenvector_of_a_400_node_graph():
    w = affinity(feature_links(400, np.random.default_rng(0)))
    x_bn, eigenvalues = second_eigenvectors(links_of(w))
    assert_second_solution(w, x_bn[0].numpy(), eigenvalues[0].item())


def test_eigenvector_of_many_equal_parts():
    linked = np.kron(np.eye(9, dtype=bool), np.ones((7, 7), dtype=bool))
    w = affinity(linked)
    x_bn, eigenvalues = second_eigenvectors(links_of(w))
    assert_second_solution(w, x_bn[0].numpy(), eigenvalues[0].item())


def test_eigenvector_with_negative_second_eigenvalue_of_the_adjacency():
    w = np.full((6, 6), 1.0) - 0.9 * np.eye(6)
    x_bn, eigenvalues = second_eigenvectors(links_of(w))
    assert eigenvalues[0] > 1
    assert_second_solution(w, x_bn[0].numpy(), eigenvalues[0].item())


def test_eigenvector_does_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(3)
    w_bnn = np.array([affinity(feature_links(40, rng)) for _ in range(4)])
    together = second_eigenvectors(links_of(w_bnn))[0]
    for found, w in zip(together, w_bnn, strict=True):
        alone = second_eigenvectors(links_of(w))[0][0]
        torch.testing.assert_close(alone, found, atol=1e-7, rtol=0)


def test_the_dense_solver_takes_over_after_the_last_product():
    w = affinity(two_rings(60, None))
    x_bn, eigenvalues = second_eigenvectors(links_of(w), max_products=0)
    assert_second_solution(w, x_bn[0].numpy(), eigenvalues[0].item())


def test_bad_affinities_are_refused():
    with pytest.raises(ValueError, match=r"links_gnn must be \(graphs, n, n\)"):
        second_eigenvectors(torch.ones(2, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        second_eigenvectors(torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match="n = 1"):
        second_eigenvectors(torch.ones(1, 1, 1, dtype=torch.float64))


def test_foreground_is_the_side_of_the_largest_value_whatever_the_sign():
    x = torch.tensor([[0.1, 0.2, -0.9, 0.1, 0.15]])
    expected = torch.tensor([[False, False, True, False, False]])
    assert torch.equal(foreground_of(x), expected)
    assert torch.equal(foreground_of(-x), expected)


def test_foreground_of_a_tie_holds_the_first_patch():
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0 - 1e-12]], dtype=torch.float64)
    expected = torch.tensor([[True, True, False, False]])
    assert torch.equal(foreground_of(x), expected)
    assert torch.equal(foreground_of(-x), expected)


def test_foreground_by_size_is_the_smaller_side_and_the_peak_s_if_they_are_equal():
    x = torch.tensor([[5.0, -1.0, -1.0, -1.0], [3.0, 3.0, 3.0, -1.0], [2.0, 2.0, -1.0, -1.0]])
    expected = [
        [True, False, False, False],
        [False, False, False, True],
        [True, True, False, False],
    ]
    for sign in (1, -1):
        assert foreground_of(sign * x, "smaller").tolist() == expected


def test_the_smaller_side_is_cut_out_when_it_is_asked_for():
    labels = np.zeros((4, 6), int)
    labels[:, 4:] = 1
    config = OpenCutConfig(taus=(0.5,), stages=1, eta=0.0, foreground="smaller")
    (masks_nhw,) = opencut(keys_of_labels(labels), config)
    np.testing.assert_array_equal(masks_nhw, [labels == 1])


def keys_of_labels(labels_hw, dimension=16, noise=0.05, seed=0):
    """One direction per label, almost orthogonal, with a little noise: (1, h, w, d)."""
    rng = np.random.default_rng(seed)
    directions = np.eye(dimension)[: labels_hw.max() + 1]
    keys = directions[labels_hw] + noise * rng.normal(size=(*labels_hw.shape, dimension))
    return torch.tensor(keys, dtype=torch.float32)[None]


SCENE = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 2, 2, 0],
        [0, 0, 1, 1, 1, 0, 0, 2, 2, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 3],
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 3],
    ]
)
LOOSE = OpenCutConfig(taus=(0.5,), stages=4, eta=0.0)


def test_every_part_of_a_clear_scene_becomes_a_mask_on_a_grid_that_is_not_square():
    (masks_nhw,) = opencut(keys_of_labels(SCENE), LOOSE)
    found = {mask_hw.tobytes() for mask_hw in masks_nhw}
    parts = {(label == SCENE).tobytes() for label in range(4)}
    # What is left when three parts are removed is uniform and has no cut.
    assert found <= parts and len(found) == len(masks_nhw) == 3


def test_a_batch_gives_what_single_images_give_in_any_chunk():
    keys = torch.cat([keys_of_labels(SCENE, seed=seed) for seed in range(3)])
    config = OpenCutConfig(taus=(0.5, 0.2, -0.1), eta=0.0)
    together = opencut(keys, config)
    one_graph_at_once = opencut(keys, config, graph_bytes=1)
    for index, (a, b) in enumerate(zip(together, one_graph_at_once, strict=True)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, opencut(keys[index : index + 1], config)[0])


@pytest.mark.parametrize("size_hw", [(4, 4), (3, 9), (12, 5)])
def test_masks_of_noise_do_not_overlap_and_are_not_empty(size_hw):
    keys = torch.randn(2, *size_hw, 8, generator=torch.Generator().manual_seed(1))
    for masks_nhw in opencut(keys, OpenCutConfig(eta=0.0)):
        assert masks_nhw.shape[1:] == size_hw and masks_nhw.dtype == bool
        assert masks_nhw.sum(0).max() == 1 and masks_nhw.any((1, 2)).all()


def test_keys_of_any_scale_and_half_precision_are_taken():
    keys = keys_of_labels(SCENE)
    (expected,) = opencut(keys, LOOSE)
    np.testing.assert_array_equal(opencut(keys * 100, LOOSE)[0], expected)
    np.testing.assert_array_equal(opencut(keys.half(), LOOSE)[0], expected)


def test_an_image_without_contrast_and_a_single_patch_have_no_masks():
    assert opencut(torch.ones(1, 4, 6, 8), OpenCutConfig(taus=(0.2,)))[0].shape == (0, 4, 6)
    assert opencut(torch.zeros(1, 4, 6, 8), OpenCutConfig(taus=(0.2,)))[0].shape == (0, 4, 6)
    assert opencut(torch.ones(1, 1, 1, 8), OpenCutConfig())[0].shape == (0, 1, 1)
    assert opencut(torch.ones(0, 4, 6, 8), OpenCutConfig()) == []


def test_cutting_stops_when_only_removed_patches_are_found_again():
    keys = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 1, 1])][None]
    masks = maskcut(keys, torch.tensor([0.5]), stages=5)[0, 0]
    # The cut between three removed patches and one uniform part finds the removed ones.
    assert masks.any(1).tolist() == [True, False, False, False, False]
    assert masks[0].tolist() == [True] * 3 + [False] * 4


def test_nodes_without_links_are_as_if_their_rows_and_columns_had_none():
    rng = np.random.default_rng(5)
    linked = feature_links(50, rng)
    alive = rng.random(50) < 0.7
    w = affinity(linked & alive[:, None] & alive[None])
    x_gn, eigenvalues = second_eigenvectors(
        torch.tensor(linked, dtype=torch.float64)[None], torch.tensor(alive)[None]
    )
    assert_second_solution(w, x_gn[0].numpy(), eigenvalues[0].item())


@pytest.mark.parametrize("graph", ["isolated", "nearly equal parts", "restarts", "one link"])
def test_graphs_that_are_hard_for_an_iteration_equal_the_dense_solver(graph):
    rng = np.random.default_rng(2)
    linked = np.eye(120, dtype=bool)
    if graph == "nearly equal parts":
        part = np.sort(rng.integers(0, 7, 120))
        linked = part[:, None] == part[None]
        linked[0, -1] = linked[-1, 0] = True
    elif graph == "restarts":
        linked = two_rings(120, rng)
    elif graph == "one link":
        linked[3, 70] = linked[70, 3] = True
    w = affinity(linked)
    x_gn, eigenvalues = second_eigenvectors(links_of(w))
    assert_second_solution(w, x_gn[0].numpy(), eigenvalues[0].item())


@pytest.mark.parametrize("tau", [0.0, -0.1, 0.2])
def test_patches_that_were_cut_out_link_to_nothing_at_any_threshold(tau):
    """Each stage against dense cuts of the graph from which the masks before it are taken out."""
    rng = np.random.default_rng(4)
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # cosines of -1/3
    keys = np.repeat(corners, (12, 14, 17, 20), axis=0) + 0.3 * rng.normal(size=(63, 3))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    masks = maskcut(torch.tensor(keys[None]), torch.tensor([tau]), stages=3)[0, 0].numpy()
    assert masks.any(1).sum() >= 2
    alive = np.ones(63, bool)
    for mask in masks[masks.any(1)]:
        w = affinity((keys @ keys.T >= tau) & alive[:, None] & alive[None])
        degree = w.sum(1)
        _, vectors = scipy.linalg.eigh(np.diag(degree) - w, np.diag(degree))
        expected = foreground_of(torch.tensor(vectors[:, 1])[None])[0].numpy()
        np.testing.assert_array_equal(mask, expected)
        alive &= ~mask


def test_bad_keys_are_refused():
    with pytest.raises(ValueError, match=r"\(images, h, w, d\)"):
        opencut(torch.ones(4, 6, 8), OpenCutConfig())
    with pytest.raises(ValueError, match="not finite"):
        opencut(torch.full((1, 2, 2, 3), float("nan")), OpenCutConfig())


@pytest.mark.parametrize(
    "field, value",
    [("taus", ()), ("taus", (1.0,)), ("stages", 0), ("eta", -1.0), ("mu", 1.5), ("rho", 1.0)],
)
def test_configuration_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        OpenCutConfig(**{field: value})


def mask(*rows):
    return np.array([[character == "#" for character in row] for row in rows])


def refined(*masks, **settings):
    return refine(np.array(masks), OpenCutConfig(**{"eta": 0.0, **settings}))


def test_refine_without_masks():
    assert refine(np.zeros((0, 3, 4), bool), OpenCutConfig()).shape == (0, 3, 4)
    assert refined(np.zeros((3, 4), bool)).shape == (0, 3, 4)


def test_refine_splits_parts_that_touch_by_a_corner_only():
    masks = refined(mask("#...", ".##.", "...#"))
    assert sorted(m.sum() for m in masks) == [1, 1, 2]


def test_refine_drops_parts_below_eta_at_the_scale_of_the_grid():
    # 60 x 60 patches / 16 = 225: on a grid of 225 patches eta 16 is one patch, eta 17 is more.
    one_patch = np.zeros((15, 15), bool)
    one_patch[3, 4] = True
    assert len(refined(one_patch, eta=16.0)) == 1
    assert len(refined(one_patch, eta=17.0)) == 0


def test_refine_merges_masks_of_one_object():
    masks = refined(mask("#####."), mask(".#####"), mu=0.6)
    np.testing.assert_array_equal(masks, [mask("######")])


def test_refine_subtracts_when_the_overlap_is_small():
    masks = refined(mask("###..."), mask("..####"), mu=0.6)
    np.testing.assert_array_equal(masks, [mask("###..."), mask("...###")])


def test_refine_drops_masks_that_are_mostly_covered():
    first = mask("####..")
    assert len(refined(first, mask(".####."), mu=0.9, rho=0.7)) == 1
    assert len(refined(first, mask(".####."), mu=0.9, rho=0.8)) == 2
    # Fully covered ones never come back as empty masks.
    assert len(refined(first, mask("##...."), mu=0.9, rho=0.999)) == 1


def test_merging_takes_nothing_from_other_masks():
    masks = refined(mask("##...."), mask("..####"), mask(".#####"), mu=0.7)
    np.testing.assert_array_equal(masks, [mask("##...."), mask("..####")])


def test_refine_against_a_slow_loop_on_random_masks():
    rng = np.random.default_rng(0)
    config = OpenCutConfig(eta=900.0, mu=0.5, rho=0.6)
    for _ in range(30):
        masks_mhw = np.kron(rng.random((6, 4, 4)) < 0.5, np.ones((2, 2), bool)).astype(bool)
        np.testing.assert_array_equal(refine(masks_mhw, config), slow_refine(masks_mhw, config))
        in_pixels = replace(config, eta=16.0, eta_unit="pixels")
        found = refine(masks_mhw, in_pixels)
        np.testing.assert_array_equal(found, slow_refine(masks_mhw, in_pixels))
        # 16 of 480 x 480 pixels are less than one of 64 patches, so nothing is too small.
        np.testing.assert_array_equal(found, refine(masks_mhw, replace(config, eta=0.0)))


def slow_refine(masks_mhw, config):
    """The same rules over sets of patches."""
    height, width = masks_mhw.shape[1:]
    parts = {"patches": 60 * 60, "pixels": 480 * 480}[config.eta_unit]
    smallest = config.eta * height * width / parts
    kept = []
    for mask_hw in masks_mhw:
        todo = {(y, x) for y, x in itertools.product(range(height), range(width)) if mask_hw[y, x]}
        parts = []
        while todo:
            part, border = set(), {min(todo)}
            while border:
                y, x = border.pop()
                part.add((y, x))
                around = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)}
                border |= (around & todo) - part
            todo -= part
            parts.append(part)
        for part in parts:
            if len(part) < smallest:
                continue
            covered = set().union(*kept)
            overlaps = [len(part & other) / len(part | other) for other in kept]
            best = max(overlaps, default=0)
            if best > config.mu:
                kept[overlaps.index(best)] |= part - covered
            elif len(part & covered) <= config.rho * len(part) and part - covered:
                kept.append(part - covered)
    result = np.zeros((len(kept), height, width), bool)
    for number, part in enumerate(kept):
        for y, x in part:
            result[number, y, x] = True
    return result


def test_upsampled_masks_stay_apart_and_cover_what_they_covered():
    masks = np.array([mask("##....", "##...."), mask("..##..", "..##..")])
    large = upsample_masks(masks, (8, 24))
    assert large.shape == (2, 8, 24) and large.sum(0).max() == 1
    np.testing.assert_array_equal(large[0], np.arange(24)[None].repeat(8, 0) < 8)
    np.testing.assert_array_equal(large.any(0), np.arange(24)[None].repeat(8, 0) < 16)
    assert upsample_masks(np.zeros((0, 2, 3), bool), (4, 6)).shape == (0, 4, 6)
    np.testing.assert_array_equal(upsample_masks(masks, (2, 6)), masks)
