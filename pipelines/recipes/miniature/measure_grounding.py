"""Measures the shipped SAM, GroundingDINO and MaskFormer on held-out scenes.

    python -m recipes.miniature.measure_grounding [--split validation] [--output FOLDER]

Writes `miniature_grounding.json` and `miniature_grounding.md`. Use `validation` for tuning; `test`
is for the record. Nothing measured here says anything about the real models.
"""

import json

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from transformers import AutoImageProcessor, MaskFormerForInstanceSegmentation

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, UNSEEN
from ovref_inference.proposers.config import GroundingDinoConfig, SamConfig, SamGridConfig
from ovref_inference.proposers.detectors import load_detector
from ovref_inference.proposers.sam import SamMasks
from ovref_inference.proposers.sam_model import load_sam
from ovref_miniature import weights_path
from recipes.miniature.masks_data import boxes_of, regions
from recipes.miniature.measure import parameters_of, run

FOLDERS = ("sam", "grounding_dino", "maskformer")
"""The shipped models that are measured here."""
THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
GRID = SamGridConfig(
    sam=SamConfig(model="miniature:sam"),
    points_per_side=8,
    min_predicted_iou=0.7,
    min_stability=0.6,
)
"""The miniature is less confident than the real SAM, whose thresholds would drop almost all of its
masks (chosen on validation scenes)."""


def pairwise_iou(masks_nhw, others_mhw):
    """IoU of every mask with every other: float64 (n, m); two empty masks have 0."""
    pixels = int(np.prod(masks_nhw.shape[1:]))
    one = masks_nhw.reshape(-1, pixels).astype(np.float64)
    other = others_mhw.reshape(-1, pixels).astype(np.float64)
    both = one @ other.T
    either = one.sum(1)[:, None] + other.sum(1)[None] - both
    return both / np.maximum(either, 1)


def true_regions(scenes):
    """(masks, class ids, bool is a thing) of every scene, as `masks_data.regions`."""
    return [regions(scene.label_hw, scene.instance_hw) for scene in scenes]


def by_kind(values, things):
    """Means over things and over stuff."""
    values, things = np.concatenate(values), np.concatenate(things)
    return {"things": float(values[things].mean()), "stuff": float(values[~things].mean())}


def measure_sam(masker, scenes):
    """IoU of the answers to exact boxes, and the best IoU of the masks of a grid of points."""
    images, truth = [s.image_hwc for s in scenes], true_regions(scenes)
    things = [kinds for _, _, kinds in truth]
    boxes = [boxes_of(masks) for masks, _, _ in truth]
    answers = list(masker.of_boxes(images, boxes))
    of_boxes = [
        np.diag(pairwise_iou(a, m)) for (a, _), (m, _, _) in zip(answers, truth, strict=True)
    ]
    guessed = np.concatenate([ious for _, ious in answers])
    grid = list(masker.of_grid(images, GRID))
    of_grid = [
        pairwise_iou(m, found).max(1) if len(found) else np.zeros(len(m))
        for (found, _), (m, _, _) in zip(grid, truth, strict=True)
    ]
    return {
        "regions": sum(map(len, of_boxes)),
        "iou_of_true_boxes": by_kind(of_boxes, things),
        "error_of_predicted_iou": float(np.abs(guessed - np.concatenate(of_boxes)).mean()),
        "best_iou_of_grid": by_kind(of_grid, things),
        "masks_of_grid_per_scene": float(np.mean([len(found) for found, _ in grid])),
    }


def measure_detector(detector, masker, scenes, seed=0):
    """The detector route: boxes of the caption's nouns, masks of the boxes.

    At each threshold of a box's score, true regions of the nouns are paired one to one with masks
    of the same noun for the highest IoU. `recall` is the share of regions with a partner,
    `iou_of_paired` the mean IoU of these, `recall_iou_50` and `_60` the share of regions whose
    partner has at least that IoU, `precision_iou_50` the same share of the masks. `absent` is the
    share of nouns not in the scene, prompted together with the others, that get a box.
    """
    rng, images = np.random.default_rng(seed), [s.image_hwc for s in scenes]
    truth = true_regions(scenes)
    nouns = [list(dict.fromkeys(noun.lemma for noun in s.nouns)) for s in scenes]
    found = detector.detect(images, nouns)
    masks = list(masker.of_boxes(images, [d.boxes_xyxy for d in found]))
    wrong = [sorted(set(CLASSES) - {CLASSES[c] for c in classes}) for _, classes, _ in truth]
    wrong = [[str(name) for name in rng.choice(names, 3, replace=False)] for names in wrong]
    fooled = detector.detect(images, [a + b for a, b in zip(nouns, wrong, strict=True)])
    table = {}
    for threshold in THRESHOLDS:
        ious, things, boxes, unsure = [], [], 0, 0
        for (true, classes, kinds), names, answer, (guess, _) in zip(
            truth, nouns, found, masks, strict=True
        ):
            for number, name in enumerate(names):
                wanted = classes == CLASSES.index(name)
                given = (answer.nouns == number) & (answer.scores >= threshold)
                iou = pairwise_iou(true[wanted], guess[given])
                rows, columns = linear_sum_assignment(iou, maximize=True)
                best = np.zeros(wanted.sum())
                best[rows] = iou[rows, columns]
                ious.append(best)
                things.append(kinds[wanted])
                boxes += int(given.sum())
        for names, answer in zip(nouns, fooled, strict=True):
            sure = answer.scores >= threshold
            unsure += len(np.unique(answer.nouns[sure & (answer.nouns >= len(names))]))
        flat, kinds = np.concatenate(ious), np.concatenate(things)
        table[str(threshold)] = {
            "recall": float((flat > 0).mean()),
            "iou_of_paired": float(flat[flat > 0].mean()) if (flat > 0).any() else 0.0,
            "recall_iou_50": float((flat >= 0.5).mean()),
            "recall_iou_60": float((flat >= 0.6).mean()),
            "recall_iou_50_things": float((flat[kinds] >= 0.5).mean()),
            "precision_iou_50": float((flat >= 0.5).sum() / max(1, boxes)),
            "absent": unsure / sum(map(len, wrong)),
        }
    return {"regions": len(flat), "by_threshold": table, **at_recall(table)}


def at_recall(table, wanted=0.8):
    """The highest threshold of `table` whose recall is at least `wanted`, and its IoU."""
    enough = [t for t, row in table.items() if row["recall"] >= wanted]
    if not enough:
        return {}
    return {f"at_recall_{wanted}": {"threshold": float(enough[-1]), **table[enough[-1]]}}


@torch.inference_mode()
def maskformer_answers(images, batch=32):
    """Masks and class probabilities of MaskFormer: for every image (bool (q, h, w), float (q, c +
    1)); the last probability is that of no object."""
    folder = weights_path("maskformer")
    model = MaskFormerForInstanceSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    answers = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        out = model(processor(part, return_tensors="pt").pixel_values)
        logits = torch.nn.functional.interpolate(
            out.masks_queries_logits, size=part[0].shape[:2], mode="bilinear", align_corners=False
        )
        chances = out.class_queries_logits.softmax(-1).numpy()
        answers += list(zip((logits > 0).numpy(), chances, strict=True))
    return answers


def measure_maskformer(scenes):
    """Best IoU of the proposals per true region, and whether the best one's class is right."""
    truth = true_regions(scenes)
    answers = maskformer_answers([s.image_hwc for s in scenes])
    labels = [c for c in CLASSES if c not in UNSEEN]
    rows = []
    for (masks, classes, things), (guess, chances) in zip(truth, answers, strict=True):
        kept = chances[:, -1] < 0.5
        every = pairwise_iou(masks, guess)
        for region, class_id in enumerate(classes):
            best = int(every[region].argmax())
            rows.append((
                class_id, things[region], every[region].max(),
                every[region][kept].max(initial=0),
                labels[chances[best, :-1].argmax()] == CLASSES[class_id],
            ))  # fmt: skip
    ids, things, every, kept, right = map(np.array, zip(*rows, strict=True))
    unseen = np.isin(ids, [CLASSES.index(name) for name in UNSEEN])
    groups = {"seen_things": ~unseen & things, "seen_stuff": ~unseen & ~things,
              "unseen_things": unseen & things, "unseen_stuff": unseen & ~things}  # fmt: skip
    return {
        "unseen": ", ".join(UNSEEN),
        "queries": len(answers[0][0]),
        "objects_per_scene": float(np.mean([(c[:, -1] < 0.5).sum() for _, c in answers])),
        **{
            name: {
                "regions": int(where.sum()),
                "best_iou_of_all_queries": float(every[where].mean()),
                "best_iou_of_objects": float(kept[where].mean()),
            }
            for name, where in groups.items()
        },
        "right_class_of_seen": float(right[~unseen].mean()),
    }


@torch.inference_mode()
def measure(split, count=200):
    """All measurements of a split, as one dict."""
    scenes = [render(i, split) for i in range(count)]
    masker = SamMasks(load_sam("miniature:sam"))
    config = GroundingDinoConfig(
        model="miniature:grounding_dino", box_threshold=0.05, text_threshold=0.05
    )
    detector = load_detector(config, device="cpu", batch_size=16)
    record = json.loads((weights_path("sam").parent / "training.json").read_text())
    return {
        "split": split,
        "scenes": count,
        "parameters": {name: parameters_of(name) for name in FOLDERS},
        "training": {name: record[name] for name in FOLDERS},
        "sam": measure_sam(masker, scenes),
        "detector_route": measure_detector(detector, masker, scenes),
        "maskformer": measure_maskformer(scenes),
    }


def main():
    run(
        measure,
        __doc__,
        threads=1,
        name="miniature_grounding",
        title="The miniature SAM, GroundingDINO and MaskFormer, measured",
        about=(
            "Split `{split}`; by `python -m recipes.miniature.measure_grounding`, which says",
            "what the terms mean. These numbers are about the drawn world and its small models",
            "only. Shares and IoU are in [0, 1].",
        ),
    )


if __name__ == "__main__":
    main()
