"""The losses against sums over pixels, written out."""

import math

import numpy as np
import pytest
import torch

from ovref.training.losses import (
    HIDDEN,
    UNLABELLED,
    class_targets,
    dice_loss,
    focal_loss,
    pseudo_labels,
    recovery_loss,
)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 4, 5, 6)) * 3
    labels = rng.integers(-1, 3, (3, 5, 6))  # the last class is shown nowhere
    labels[1] = UNLABELLED
    labels[2, :2] = HIDDEN
    return torch.from_numpy(logits), torch.from_numpy(labels)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("negative", [False, True])
def test_focal_and_dice_are_sums_over_pixels(case, negative):
    logits, labels = case
    targets = class_targets(labels, 4)
    known = torch.ones_like(labels, dtype=torch.bool) if negative else labels >= 0
    focal, dice = focal_loss(logits, targets, known), dice_loss(logits, targets, known)
    for n in range(3):
        pixels = [(y, x) for y in range(5) for x in range(6) if negative or labels[n, y, x] >= 0]
        present = {int(labels[n, y, x]) for y, x in pixels} - {UNLABELLED, HIDDEN}
        total, dices = 0.0, []
        for c in range(4):
            both = sums = 0.0
            for y, x in pixels:
                p, t = sigmoid(float(logits[n, c, y, x])), int(labels[n, y, x]) == c
                right, weight = (p, 0.25) if t else (1 - p, 0.75)
                total += -weight * (1 - right) ** 2 * math.log(right)
                both += p * t
                sums += p + t
            if c in present:
                dices.append(1 - (2 * both + 1) / (sums + 1))
        wanted = total / max(1, len(pixels)) / max(1, len(present))
        assert float(focal[n]) == pytest.approx(wanted, rel=1e-5, abs=1e-9)
        assert float(dice[n]) == pytest.approx(sum(dices) / max(1, len(dices)), rel=1e-5)
    assert float(dice[1]) == 0.0 and (float(focal[1]) == 0.0) is not negative


def test_unknown_pixels_pull_at_nothing(case):
    logits, labels = case
    logits = logits.float().requires_grad_()
    targets, known = class_targets(labels, 4), labels >= 0
    (focal_loss(logits, targets, known) + dice_loss(logits, targets, known)).sum().backward()
    gradient = logits.grad.abs().sum(1)
    assert (gradient[~known] == 0).all() and (gradient[known] > 0).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_large_logits_stay_finite(sign):
    logits = torch.full((1, 2, 3, 3), sign * 200.0, requires_grad=True)
    labels = torch.zeros((1, 3, 3), dtype=torch.int64)
    focal_loss(logits, class_targets(labels, 2), labels >= 0).sum().backward()
    assert logits.grad.isfinite().all()


def test_recovery_is_the_mean_difference_of_each_image():
    found, wanted = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]), torch.zeros(2, 1, 2)
    assert recovery_loss(found, wanted, "l1").tolist() == [2.0, 0.0]
    assert recovery_loss(found, wanted, "l2").tolist() == [5.0, 0.0]


def test_hidden_pixels_take_the_best_unseen_class_and_others_keep_theirs():
    logits = torch.tensor([[[[9.0, 9.0, 9.0]], [[1.0, 2.0, 0.0]], [[2.0, 1.0, 0.0]]]])
    labels = torch.tensor([[[HIDDEN, HIDDEN, UNLABELLED]]])
    unseen = torch.tensor([False, True, True])
    assert pseudo_labels(logits, labels, unseen).tolist() == [[[2, 1, UNLABELLED]]]
    kept = torch.tensor([[[0, 0, 1]]])
    assert torch.equal(pseudo_labels(logits, kept, unseen), kept)
