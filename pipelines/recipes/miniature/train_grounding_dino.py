"""Trains the miniature GroundingDINO.

    python -m recipes.miniature.train_grounding_dino --work DIR

Its prompts hold nouns that are in a scene and nouns that are not; it learns the boxes of the
former, things and stuff. Losses are those of the paper (Liu et al., Grounding DINO, ECCV 2024,
section 3.5): focal on the tokens of a phrase, L1 and generalised IoU, after a one-to-one matching.
Two parts differ, because data and steps are few:

- The head that picks the queries learns by place (the cells nearest to a box's centre), not by
  matching. The loss that transformers offers gives that head no gradient at all.
- Linear heads on the features before and after the encoder say what each cell shows. They are
  discarded after training.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

from ovref.miniature.captions import plural
from ovref.miniature.shapes import CLASSES, STUFF
from recipes.miniature.architectures_grounding import new_grounding_dino
from recipes.miniature.masks_data import boxes_of, load_mask_pool, regions
from recipes.miniature.train_backbone import jitter
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments
from recipes.miniature.word_pieces import BEGIN, END, STOP, vocabulary

BATCH = 16
STRIDES = (4, 8, 16)
"""Pixels per cell of each level of features."""
NEAREST = (3, 3, 2)
"""Cells per level that stand for one region when queries are picked."""
NAMED_SHARE, PLURAL_SHARE = 0.85, 0.15
"""Shares of a scene's classes that the prompt names, and of names that are in the plural."""


class WithProbes(nn.Module):
    """The detector with the two heads that say what each cell shows."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector
        width = detector.config.d_model
        self.before, self.after = nn.Linear(width, len(CLASSES)), nn.Linear(width, len(CLASSES))
        self.caught = {}
        detector.model.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: self.caught.update(cells=kwargs["vision_features"]),
            with_kwargs=True,
        )


def prompt_of(present, rng):
    """Classes to ask for, in random order: most of those present and one to four others."""
    named = [c for c in present if rng.random() < NAMED_SHARE]
    others = np.setdiff1d(np.arange(len(CLASSES)), present)
    named += rng.choice(others, int(rng.integers(1, 5)), replace=False).tolist()
    return rng.permutation(named).tolist()


def encode_prompts(prompts, rng):
    """Token ids of prompts "noun. noun." as the tokenizer gives them.

    Args:
        prompts: a list of class ids an image.

    Returns:
        (ids int64 (n, l), padded with 0; class of every token int64 (n, l), -1 for none).
    """
    known, rows = vocabulary(), []
    for prompt in prompts:
        tokens, owners = [BEGIN], [-1]
        for c in prompt:
            name = CLASSES[c]
            if c >= len(STUFF) and rng.random() < PLURAL_SHARE:
                name = plural(name)
            words = [known[word] for word in name.split()]
            tokens += [*words, STOP]
            owners += [c] * len(words) + [-1]
        rows.append(([*tokens, END], [*owners, -1]))
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    owners_nl = torch.full((len(rows), longest), -1)
    for row, (tokens, owners) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        owners_nl[row, : len(owners)] = torch.tensor(owners)
    return ids, owners_nl


def cells_of(masks_nhw, boxes_xyxy):
    """For every region the cells that stand for it: list of int64 (k,), cells of all levels in a
    row as in the features."""
    chosen, start = [[] for _ in masks_nhw], 0
    for stride, count in zip(STRIDES, NEAREST, strict=True):
        side = masks_nhw.shape[-1] // stride
        middle = (np.arange(side) + 0.5) * stride
        for region, (mask, box) in enumerate(zip(masks_nhw, boxes_xyxy, strict=True)):
            rows, columns = np.nonzero(mask[stride // 2 :: stride, stride // 2 :: stride])
            far = np.hypot(
                middle[columns] - (box[0] + box[2]) / 2, middle[rows] - (box[1] + box[3]) / 2
            )
            nearest = np.argsort(far, kind="stable")[:count]
            chosen[region].extend(start + rows[nearest] * side + columns[nearest])
        start += side * side
    return [torch.tensor(cells, dtype=torch.int64) for cells in chosen]


def cell_classes(labels_nhw):
    """Share of every class in every cell of all levels: float32 (n, cells, classes)."""
    shares = functional.one_hot(labels_nhw.long(), len(CLASSES)).permute(0, 3, 1, 2).float()
    levels, stride = [], 1
    for wanted in STRIDES:
        shares, stride = functional.avg_pool2d(shares, wanted // stride), wanted
        levels.append(shares.flatten(2).transpose(1, 2))
    return torch.cat(levels, 1)


def focal(logits, truth, alpha=0.25):
    """Sigmoid focal loss of every element (Lin et al., 2017; gamma 2)."""
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    chance = logits.sigmoid()
    wrong = chance * (1 - truth) + (1 - chance) * truth
    return entropy * wrong**2 * (alpha * truth + (1 - alpha) * (1 - truth))


@torch.no_grad()
def match(logits_ql, boxes_qd, truth_kl, boxes_kd):
    """Pairs of least cost, as in transformers' matcher: (queries, targets), int64 (k,) each."""
    chance = logits_ql.sigmoid()
    positive = 0.25 * (1 - chance) ** 2 * -(chance + 1e-8).log()
    negative = 0.75 * chance**2 * -(1 - chance + 1e-8).log()
    share = truth_kl / truth_kl.sum(1, keepdim=True)
    cost = (positive - negative) @ share.T
    cost = cost + 5 * torch.cdist(boxes_qd, boxes_kd, p=1)
    cost = cost - 2 * generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy")
                                            for b in (boxes_qd, boxes_kd)))  # fmt: skip
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(targets)


def head_loss(logits_nql, boxes_nqd, targets, pairs, valid_nl):
    """Focal on phrases, L1 and generalised IoU of matched boxes, each per target.

    Args:
        logits_nql: of every query for every token.
        boxes_nqd: centre x, centre y, width, height in [0, 1].
        targets: an image's (phrase float (k, l), boxes float (k, 4)).
        pairs: an image's (queries, targets).
        valid_nl: True for tokens that are no padding.
    """
    truth, guessed, wanted = torch.zeros_like(logits_nql), [], []
    for row, ((phrases, boxes), (queries, chosen)) in enumerate(zip(targets, pairs, strict=True)):
        truth[row, queries] = phrases[chosen]
        guessed.append(boxes_nqd[row, queries])
        wanted.append(boxes[chosen])
    guessed, wanted = torch.cat(guessed), torch.cat(wanted)
    count = max(1, len(wanted))
    chosen = valid_nl[:, None].expand_as(logits_nql)
    phrase = focal(logits_nql[chosen], truth[chosen]).sum() / count
    place = functional.l1_loss(guessed, wanted, reduction="sum") / count
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (guessed, wanted)]
    overlap = generalized_box_iou_loss(*corners, reduction="sum") / count
    return 2 * phrase + 5 * place + 2 * overlap, 1 - overlap.item()


def detection_loss(probed, images, labels_nhw, ids, owners_nl, found):
    """Loss of a batch.

    Args:
        probed: WithProbes.
        images: float32 (n, 3, 64, 64) in [-1, 1].
        labels_nhw: uint8 (n, 64, 64).
        ids, owners_nl: as `encode_prompts` returns them.
        found: an image's (masks (k, 64, 64), class ids (k,)) of all its regions.

    Returns:
        (loss, facts to log).
    """
    detector, valid = probed.detector, ids != 0
    length = ids.shape[1]
    out = detector(pixel_values=images, input_ids=ids, attention_mask=valid.long())
    shares = cell_classes(labels_nhw)
    cells = out.encoder_last_hidden_state_vision
    auxiliary = sum(
        functional.cross_entropy(head(x).transpose(1, 2), shares.transpose(1, 2))
        for head, x in ((probed.before, probed.caught["cells"]), (probed.after, cells))
    )
    targets, places = [], []
    for row, (masks, classes) in enumerate(found):
        asked = np.isin(classes, owners_nl[row].numpy())
        boxes = boxes_of(masks[asked])
        phrases = owners_nl[row][None] == torch.from_numpy(classes[asked])[:, None]
        where = cells_of(masks[asked], boxes)
        of_target = [torch.full_like(c, i) for i, c in enumerate(where)]
        none = [torch.zeros(0, dtype=torch.int64)]
        places.append((torch.cat(none + where), torch.cat(none + of_target)))
        boxes = box_convert(torch.from_numpy(boxes) / images.shape[-1], "xyxy", "cxcywh")
        targets.append((phrases.float(), boxes))
    first = head_loss(
        out.enc_outputs_class[..., :length],
        out.enc_outputs_coord_logits.clamp(-12, 12).sigmoid(),
        targets, places, valid,
    )[0]  # fmt: skip
    total = 2 * auxiliary + first
    for level in range(detector.config.decoder_layers):
        hidden = out.intermediate_hidden_states[:, level]
        start = out.init_reference_points
        if level:
            start = out.intermediate_reference_points[:, level - 1]
        logits = detector.class_embed[level](
            vision_hidden_state=hidden,
            text_hidden_state=out.encoder_last_hidden_state_text,
            text_token_mask=valid,
        )[..., :length]
        boxes = (detector.bbox_embed[level](hidden) + torch.special.logit(start, 1e-5)).sigmoid()
        pairs = [
            match(a[:, v], b, phrases[:, v], wanted)
            for a, b, v, (phrases, wanted) in zip(logits, boxes, valid, targets, strict=True)
        ]
        loss, overlap = head_loss(logits, boxes, targets, pairs, valid)
        total = total + loss
    right = torch.cat([
        phrases[chosen, logits[row, queries].argmax(1)]
        for row, ((phrases, _), (queries, chosen)) in enumerate(zip(targets, pairs, strict=True))
    ])  # fmt: skip
    guess = probed.after(cells).argmax(-1)
    return total, {
        "cells": auxiliary.item(),
        "picked": first.item(),
        "giou": overlap,
        "phrase": right.mean().item() if len(right) else 0.0,
        "cell_right": (guess == shares.argmax(-1)).float().mean().item(),
    }


def main():
    arguments = parse_arguments(__doc__, steps=3000)
    pool = load_mask_pool(arguments.work)
    torch.manual_seed(8)
    probed = WithProbes(new_grounding_dino())

    def loss_of(step, rng):
        rows = rng.integers(len(pool.nouns), size=BATCH)
        images, flipped = jitter(images_to_torch(pool.images_nhwc[rows]), rng, with_flips=True)
        turn = flipped.numpy()[:, None, None]
        labels = np.where(turn, pool.labels_nhw[rows][:, :, ::-1], pool.labels_nhw[rows])
        instances = np.where(turn, pool.instances_nhw[rows][:, :, ::-1], pool.instances_nhw[rows])
        found = [regions(*maps)[:2] for maps in zip(labels, instances, strict=True)]
        prompts = [prompt_of(np.unique(classes), rng) for _, classes in found]
        ids, owners = encode_prompts(prompts, rng)
        return detection_loss(probed, images, torch.from_numpy(labels), ids, owners, found)

    facts = fit("grounding_dino", arguments.work, probed, loss_of, arguments.steps, rate=8e-4)
    note(arguments.work, grounding_dino=facts)


if __name__ == "__main__":
    main()
