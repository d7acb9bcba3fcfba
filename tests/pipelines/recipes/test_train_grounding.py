"""Training targets of SAM and GroundingDINO, against slow or known answers."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torchvision.ops import box_convert, generalized_box_iou  # noqa: E402

from ovref.miniature.scenes import render  # noqa: E402
from ovref.miniature.shapes import CLASSES  # noqa: E402
from recipes.miniature.train_grounding_dino import (  # noqa: E402
    STRIDES,
    cell_classes,
    cells_of,
    encode_prompts,
    focal,
    match,
    prompt_of,
)
from recipes.miniature.train_sam import jittered_boxes, points_in, targets_of, true_iou  # noqa: E402
from recipes.miniature.word_pieces import save_tokenizer, vocabulary  # noqa: E402


def test_special_tokens_have_the_ids_that_grounding_dino_looks_for():
    from transformers.models.grounding_dino.modeling_grounding_dino import SPECIAL_TOKENS

    known = vocabulary()
    assert [known[t] for t in ("[CLS]", "[SEP]", ".", "?")] == SPECIAL_TOKENS
    assert len(set(known.values())) == len(known) and known["[PAD]"] == 0


def test_prompts_are_encoded_as_by_the_tokenizer(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    wall, tree = CLASSES.index("brick wall"), CLASSES.index("tree")
    ids, owners = encode_prompts([[tree, wall], [wall]], np.random.default_rng(0))
    plain = tokenizer(["tree. brick wall.", "brick wall."], padding=True).input_ids
    assert ids.tolist() == plain
    assert owners[0].tolist() == [-1, tree, -1, wall, wall, -1, -1]
    assert owners[1].tolist() == [-1, wall, wall, -1, -1, -1, -1]


def test_every_noun_is_known_and_any_word_can_be_spelled(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    for name in CLASSES:
        assert tokenizer.tokenize(name) == name.split()
    assert tokenizer.unk_token_id not in tokenizer("Xylophone, über 7!").input_ids


def test_prompts_name_absent_classes_too():
    rng = np.random.default_rng(0)
    prompts = [prompt_of(np.array([2, 9]), rng) for _ in range(200)]
    others = [len(set(prompt) - {2, 9}) for prompt in prompts]
    assert min(others) == 1 and max(others) == 4
    assert 0.75 < np.mean([2 in prompt for prompt in prompts]) < 0.95
    assert all(len(set(prompt)) == len(prompt) for prompt in prompts)


def test_cells_lie_in_their_region():
    scene = render(11)
    masks = np.stack([scene.label_hw == c for c in np.unique(scene.label_hw)])
    boxes = np.tile([0, 0, 64, 64], (len(masks), 1))
    starts = np.cumsum([0, *((64 // stride) ** 2 for stride in STRIDES)])
    for mask, cells in zip(masks, cells_of(masks, boxes), strict=True):
        assert len(cells)
        for cell in cells.tolist():
            level = np.searchsorted(starts, cell, side="right") - 1
            stride = STRIDES[level]
            row, column = divmod(cell - starts[level], 64 // stride)
            assert mask[row * stride + stride // 2, column * stride + stride // 2]


def test_cell_classes_are_shares_of_pixels():
    labels = torch.from_numpy(render(5).label_hw)[None]
    shares = cell_classes(labels)[0]
    assert shares.shape == (16 * 16 + 8 * 8 + 4 * 4, len(CLASSES))
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    last = labels[0, 48:, 48:]
    wanted = torch.bincount(last.flatten().long(), minlength=len(CLASSES)) / 256
    torch.testing.assert_close(shares[-1], wanted)


def test_focal_is_transformers_focal():
    from transformers.loss.loss_grounding_dino import sigmoid_focal_loss

    torch.manual_seed(0)
    logits, truth = torch.randn(5, 7), (torch.rand(5, 7) < 0.4).float()
    torch.testing.assert_close(focal(logits, truth).sum() / 3, sigmoid_focal_loss(logits, truth, 3))


def test_matching_is_the_cheapest_of_all():
    torch.manual_seed(1)
    logits, boxes = torch.randn(4, 6), torch.rand(4, 4) * 0.4 + 0.3
    truth, wanted = torch.eye(6)[[1, 4, 5]], torch.rand(3, 4) * 0.4 + 0.3
    truth[0, 2] = 1
    p = logits.sigmoid()
    each = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes, wanted)]
    cost = torch.stack([each[:, row > 0].mean(1) for row in truth], 1)
    cost = cost + 5 * (boxes[:, None] - wanted).abs().sum(-1) - 2 * generalized_box_iou(*corners)
    best = min(
        itertools.permutations(range(4), 3), key=lambda q: sum(cost[i, j] for j, i in enumerate(q))
    )
    queries, targets = match(logits, boxes, truth, wanted)
    assert dict(zip(targets.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))


def test_sam_is_asked_for_whole_regions_and_their_parts():
    scene, rng = render(1), np.random.default_rng(2)
    masks = targets_of(scene.label_hw, scene.instance_hw, rng, count=40)
    assert masks.shape == (40, 64, 64) and masks.any((1, 2)).all()
    assert all(len(np.unique(scene.label_hw[mask])) == 1 for mask in masks)
    points = points_in(masks, rng).long()
    assert masks[np.arange(40), points[:, 1], points[:, 0]].all()
    boxes = jittered_boxes(masks, rng)
    assert boxes.min() >= 0 and boxes.max() <= 64 and (boxes[:, 2:] > boxes[:, :2]).all()


def test_iou_of_logits():
    masks = torch.zeros(1, 2, 2)
    masks[0, 0] = 1
    logits = torch.full((1, 2, 2, 2), -1.0)
    logits[0, 0, :, 0] = 1
    assert true_iou(logits, masks).tolist() == [[pytest.approx(1 / 3), 0]]
