"""Matching and its losses against sums over points and pixels, and all permutations tried."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from ovref.identity import fingerprint
from ovref.training.labelled_batches import LabelledBatch
from ovref.training.losses import HIDDEN, UNLABELLED
from ovref.training.matching import MatchingLosses, best_names, losses_of, segment_targets
from ovref_inference.pixels import Pixels
from ovref_inference.proposers.mask_decoder import Decoded

QUERIES, DIM, SEED = 4, 5, 7
CLASS_OF = (0, 1, 1, 2)  # the second class has two names
POINTS = MatchingLosses(points=40, oversample=2.5, uncertain=0.6)
PIXELS = MatchingLosses(classes=1.5, masks=20.0, dice=0.5, void=0.2, points=0)


class Head(nn.Module):
    """What the losses ask of a head."""

    def __init__(self):
        super().__init__()
        self.void = nn.Parameter(torch.randn(1, DIM))
        self.scale = 9.0


class Network(nn.Module):
    """Two layers of given answers for the images whose first pixel names their rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = Head()
        self.masks = nn.Parameter(3 * torch.randn(2, 3, QUERIES, 4, 6))
        self.embeddings = nn.Parameter(torch.randn(2, 3, QUERIES, DIM))

    def forward(self, pixels):
        rows = (255 * pixels[:, 0, 0, 0]).round().long()
        return [
            Decoded(masks_bqhw=masks[rows], embeddings_bqd=embeddings[rows])
            for masks, embeddings in zip(self.masks, self.embeddings, strict=True)
        ]


def segments():
    """Three maps of 8 x 12: two or three segments, two of which may share a class."""
    maps = np.full((3, 8, 12), UNLABELLED, np.int64)
    maps[0, :5], maps[0, 5:, :7] = 0, 1
    maps[1, :, :4], maps[1, :4, 4:], maps[1, 6:, 6:] = 3, 1, 0
    maps[2, 2:, 2:] = 2
    maps[2, :2] = HIDDEN
    classes = np.array([[2, 0, -9, -9], [1, -9, -9, 1], [-9, -9, 2, -9]])
    classes[1, 1] = 0
    labels = np.stack([np.where(m < 0, m, c[m]) for m, c in zip(maps, classes, strict=True)])
    return maps, labels


def batch_of(*rows):
    maps, labels = segments()
    images = np.zeros((len(rows), 8, 12, 3), np.uint8)
    for place, row in enumerate(rows):
        images[place] = row
    return LabelledBatch(
        tuple(map(str, rows)), images, labels[list(rows)], maps[list(rows)], rows[0]
    )


def made(config):
    torch.manual_seed(1)
    texts = nn.functional.normalize(torch.randn(4, DIM), dim=1)
    images = Pixels((0.0,) * 3, (1.0,) * 3, "bilinear", torch.device("cpu"), torch.float32)
    return losses_of(config, texts, CLASS_OF, images, SEED), texts


def sampled(map_hw, x, y):
    """Bilinear value at a place in [0, 1] x [0, 1]; zero beyond the edges."""
    height, width = map_hw.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for i, j in itertools.product((math.floor(row), math.floor(row) + 1),
                                  (math.floor(column), math.floor(column) + 1)):  # fmt: skip
        if 0 <= i < height and 0 <= j < width:
            total += (1 - abs(row - i)) * (1 - abs(column - j)) * float(map_hw[i, j])
    return total


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def entropy(logit, target):
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def focal(logit, target):
    p = sigmoid(logit)
    right, weight = (p, 0.25) if target else (1 - p, 0.75)
    return -weight * (1 - right) ** 2 * math.log(right)


def dice(logits, targets):
    probabilities = [sigmoid(one) for one in logits]
    both = sum(p * t for p, t in zip(probabilities, targets, strict=True))
    return 1 - (2 * both + 1) / (sum(probabilities) + sum(targets) + 1)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def slow_probabilities(network, layer, row, texts):
    """(queries, classes + 1) of the softmax over the best names of classes, and void."""
    found = []
    void = network.head.void.detach()[0].numpy()
    for one in network.embeddings[layer, row].detach().numpy():
        unit = one / np.linalg.norm(one)
        names = [9.0 * float(unit @ text) for text in texts.numpy()]
        logits = [max(names[i] for i in range(4) if CLASS_OF[i] == c) for c in range(3)]
        logits.append(9.0 * float(unit @ void / np.linalg.norm(void)))
        powers = [math.exp(one) for one in logits]
        found.append([power / sum(powers) for power in powers])
    return found


def slow_losses(config, network, texts, row):
    """The three terms of one image, from its segments one by one."""
    maps, labels = (torch.from_numpy(one[row]) for one in segments())
    targets = [(maps == n).float() for n in sorted(set(maps[maps >= 0].tolist()))]
    classes = [int(labels[target > 0][0]) for target in targets]
    totals = dict.fromkeys(("classes", "masks", "dice"), 0.0)
    torch.manual_seed(int(fingerprint([SEED, row])[:15], 16))
    for layer in range(2):
        masks = network.masks[layer, row].detach()
        said = slow_probabilities(network, layer, row, texts)
        if config.points:
            places = torch.rand(1, config.points, 2)[0].tolist()
            at = lambda one, where=places: [sampled(one, x, y) for x, y in where]  # noqa: E731
            costs, score = (at, at), entropy
        else:
            every = lambda one: one.flatten().tolist()  # noqa: E731
            costs, score = (every, lambda one: one[::2, ::2].flatten().tolist()), focal
        cost = [
            [
                config.masks * mean(map(score, costs[0](mask), costs[1](target)))
                + config.dice * dice(costs[0](mask), costs[1](target))
                - config.classes * said[query][classes[k]]
                for k, target in enumerate(targets)
            ]
            for query, mask in enumerate(masks)
        ]
        best = min(
            itertools.permutations(range(QUERIES), len(targets)),
            key=lambda chosen: sum(cost[query][k] for k, query in enumerate(chosen)),
        )
        pairs = sorted(zip(best, range(len(targets)), strict=True))
        wanted = {query: classes[k] for query, k in pairs}
        weights = [1.0 if query in wanted else config.void for query in range(QUERIES)]
        logs = [-math.log(said[query][wanted.get(query, 3)]) for query in range(QUERIES)]
        totals["classes"] += sum(np.multiply(weights, logs)) / sum(weights)
        if config.points:
            drawn = torch.rand(len(pairs), int(config.points * config.oversample), 2)
            certain = [
                sorted(where.tolist(), key=lambda p: abs(sampled(masks[query], *p)))
                for (query, _), where in zip(pairs, drawn, strict=True)
            ]  # fmt: skip
            kept = int(config.uncertain * config.points)
            rest = torch.rand(len(pairs), config.points - kept, 2)
            points = [a[:kept] + b.tolist() for a, b in zip(certain, rest, strict=True)]
        for number, (query, k) in enumerate(pairs):
            if config.points:
                logits = [sampled(masks[query], *p) for p in points[number]]
                truth = [sampled(targets[k], *p) for p in points[number]]
            else:
                small = masks[query][None, None]
                large = nn.functional.interpolate(small, (8, 12), mode="bilinear")
                logits, truth = large.flatten().tolist(), targets[k].flatten().tolist()
            totals["masks"] += mean(map(score, logits, truth)) / len(pairs)
            totals["dice"] += dice(logits, truth) / len(pairs)
    return {name: getattr(config, name) * value for name, value in totals.items()}


@pytest.mark.parametrize("config", [POINTS, PIXELS], ids=["mask2former", "maskformer"])
def test_losses_are_those_of_the_best_matching(config):
    network, (losses, texts) = Network(), made(config)
    found = {n: term.detach() for n, term in losses(network, batch_of(0, 1, 2)).items()}
    assert set(found) == {"classes", "masks", "dice"}
    for row in range(3):
        for name, wanted in slow_losses(config, network, texts, row).items():
            assert float(found[name][row]) == pytest.approx(wanted, rel=2e-5), (row, name)


@pytest.mark.parametrize("config", [POINTS, PIXELS], ids=["mask2former", "maskformer"])
def test_an_image_costs_the_same_beside_any_others(config):
    network, (losses, _) = Network(), made(config)
    whole = losses(network, batch_of(0, 1, 2))
    parts = [losses(network, batch_of(0, 1)), losses(network, batch_of(2))]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values)
    torch.stack(list(whole.values())).sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    assert (network.masks.grad.abs().sum((3, 4)) > 0).sum() == 2 * 6  # of the matched ones alone


def test_pixels_without_a_segment_are_of_no_mask():
    maps, labels = (torch.from_numpy(one) for one in segments())
    masks, classes = segment_targets(maps[1], labels[1])
    assert masks.shape == (3, 8, 12) and classes.tolist() == [1, 0, 1]
    assert torch.equal(masks.sum(0) > 0, maps[1] >= 0)
    masks, classes = segment_targets(maps[2], labels[2])
    assert classes.tolist() == [2] and not masks[0, :2].any()


def test_a_class_is_as_near_as_its_best_name():
    logits = torch.tensor([[1.0, 5.0, 2.0, 3.0, 0.5]])
    assert best_names(logits, torch.tensor(CLASS_OF)).tolist() == [[1.0, 5.0, 3.0, 0.5]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": 0.0}, "masks must be above 0"),
        ({"void": 2.0}, "void must be in"),
        ({"points": -1}, "points must be at least 0"),
        ({"oversample": 0.5}, "oversample must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MatchingLosses(**changes)
