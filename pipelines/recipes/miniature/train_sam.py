"""Trains the miniature SAM on boxes and points: `python -m recipes.miniature.train_sam --work DIR`.

The losses are the paper's (Kirillov et al., Segment Anything, appendix A): focal, dice and the
squared error of the guessed IoU, the latter two as they are, focal times 20; of the three masks
for an ambiguous prompt only the best one learns. A quarter of the images is prompted once more,
with the first answer as mask prompt and a point where that was wrong.
"""

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from recipes.miniature.architectures_grounding import new_sam
from recipes.miniature.masks_data import boxes_of, load_mask_pool, regions
from recipes.miniature.train_backbone import jitter
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH, BY_BOX, PROMPTS = 8, 5, 6
"""Images per step, how many of them are prompted with boxes (the others with points), prompts per
image."""
AGAIN_SHARE = 0.25
FOCAL_WEIGHT = 20.0


def targets_of(label_hw, instance_hw, rng, count=PROMPTS):
    """Target masks: things, whole stuff regions and their connected parts.

    Returns:
        bool (count, h, w), drawn with replacement; half of the draws are things where there are
        any.
    """
    masks, _, things = regions(label_hw, instance_hw)
    found = [masks]
    for mask in masks[~things]:
        numbers, parts = ndimage.label(mask)
        if parts > 1:
            each = numbers == np.arange(1, parts + 1)[:, None, None]
            found.append(each[each.sum((1, 2)) >= 12])
    masks = np.concatenate(found)
    share = np.full(len(masks), 1.0)
    if things.any():
        share[: len(things)][things] = max(1, (len(masks) - things.sum())) / things.sum()
    return masks[rng.choice(len(masks), count, p=share / share.sum())]


def jittered_boxes(masks_nhw, rng):
    """Boxes around the masks, each side moved by about a twelfth of the box's side."""
    boxes = boxes_of(masks_nhw)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    noise = np.clip(rng.normal(0, 0.08, boxes.shape), -0.2, 0.2) * sides
    noise[rng.random(len(boxes)) < 0.25] = 0
    return torch.from_numpy(np.clip(boxes + noise, 0, masks_nhw.shape[-1]).astype(np.float32))


def points_in(masks_nhw, rng):
    """One point in each mask: (float32 (n, 2) x and y in pixels)."""
    points = []
    for mask in masks_nhw:
        rows, columns = np.nonzero(mask)
        pick = rng.integers(len(rows))
        points.append((columns[pick], rows[pick]))
    return torch.tensor(points, dtype=torch.float32)


def mask_losses(logits, masks):
    """Focal times 20 plus dice of logits (n, k, h, w) against masks float (n, h, w): (n, k)."""
    truth = masks[:, None].expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    chance = logits.sigmoid()
    right = chance * truth + (1 - chance) * (1 - truth)
    focal = (entropy * (1 - right) ** 2 * (0.25 * truth + 0.75 * (1 - truth))).mean((2, 3))
    overlap = 2 * (chance * truth).sum((2, 3)) + 1
    dice = 1 - overlap / (chance.sum((2, 3)) + truth.sum((2, 3)) + 1)
    return FOCAL_WEIGHT * focal + dice


def true_iou(logits, masks):
    """IoU of the masks `logits > 0` with the truth: (n, k)."""
    guess, truth = logits > 0, masks[:, None] > 0.5
    union = (guess | truth).sum((2, 3))
    return (guess & truth).sum((2, 3)) / union.clamp(min=1)


def answer_loss(logits, guessed_iou, masks, ambiguous):
    """Loss of one answer: logits (n, 4, h, w), guessed IoU (n, 4), masks float (n, h, w).

    The first mask is the single answer, the other three the answers to an ambiguous prompt.
    """
    each = mask_losses(logits, masks)
    single, best = each[:, 0].mean(), each[:, 1:].amin(1).mean()
    iou = true_iou(logits.detach(), masks)
    guess = functional.mse_loss(guessed_iou, iou)
    weights = (0.3, 1.0) if ambiguous else (1.0, 0.3)
    return weights[0] * single + weights[1] * best + guess, iou


def main():
    arguments = parse_arguments(__doc__, steps=4000)
    pool = load_mask_pool(arguments.work)
    torch.manual_seed(7)
    sam = new_sam()

    def loss_of(step, rng):
        rows = rng.integers(len(pool.nouns), size=BATCH)
        images, flipped = jitter(images_to_torch(pool.images_nhwc[rows]), rng, with_flips=True)
        embeddings = sam.image_encoder(sam.preprocess((images + 1) * 127.5))
        places = sam.prompt_encoder.get_dense_pe()
        total, facts = 0.0, {"box_iou": [], "point_iou": []}
        for place, row in enumerate(rows):
            embedding, by_box = embeddings[place], place < BY_BOX
            label, instance = pool.labels_nhw[row], pool.instances_nhw[row]
            if flipped[place]:
                label, instance = label[:, ::-1], instance[:, ::-1]
            wanted = targets_of(label, instance, rng)
            masks = torch.from_numpy(wanted).float()
            points = boxes = None
            if by_box:
                boxes = jittered_boxes(wanted, rng)
            else:
                points = points_in(wanted, rng)[:, None], torch.ones(PROMPTS, 1)
            sparse, dense = sam.prompt_encoder(points, boxes, None)
            logits, guessed = sam.mask_decoder.predict_masks(embedding[None], places, sparse, dense)
            loss, iou = answer_loss(logits, guessed, masks, ambiguous=not by_box)
            if by_box:
                facts["box_iou"].append(iou[:, 0].mean().item())
            else:
                facts["point_iou"].append(iou[:, 1:].amax(1).mean().item())
            total = total + loss
            if rng.random() < AGAIN_SHARE:
                total = total + _ask_again(
                    sam, embedding, places, logits, masks, points, boxes, rng
                )
        return total / BATCH, {name: float(np.mean(values)) for name, values in facts.items()}

    facts = fit("sam", arguments.work, sam, loss_of, arguments.steps, rate=1e-3)
    note(arguments.work, sam=facts)


def _ask_again(sam, embedding, places, logits, masks, points, boxes, rng):
    """Loss of a second answer, given the first one as mask prompt and a corrected point."""
    first = logits[:, 0].detach()
    wrong = ((first > 0) != (masks > 0.5)).numpy()
    wrong[~wrong.any((1, 2))] = True
    place = points_in(wrong, rng)
    index = torch.arange(len(masks)), place[:, 1].long(), place[:, 0].long()
    labels = masks[index]
    place, labels = place[:, None], labels[:, None]
    if points is not None:
        place, labels = torch.cat([points[0], place], 1), torch.cat([points[1], labels], 1)
    sparse, dense = sam.prompt_encoder((place, labels), boxes, first[:, None])
    logits, guessed = sam.mask_decoder.predict_masks(embedding[None], places, sparse, dense)
    return answer_loss(logits, guessed, masks, ambiguous=False)[0]


if __name__ == "__main__":
    main()
