"""The detector route on the miniature's held-out scenes, and what batching saves.

Quality: GroundingDINO is asked for the nouns of each scene's caption, SAM makes masks of its boxes,
and these are compared with the true masks: of every thing alone, of every stuff as a whole. Each
true mask is paired with at most one found mask of its noun, so that the sum of IoUs is largest. The
threshold is chosen on validation scenes (largest F1 of pairs of IoU above one half); figures are of
test scenes.

Time: SAM with all boxes of an image at once, against one call for each box, which embeds the image
each time; GroundingDINO on 8 images with different nouns at once, against one at a time. Measured
alternately in one process on its CPU time, so that other work on the machine moves ratios little.

    python tests/benchmarks/grounding.py [--output tests/benchmarks/results] [--scenes 100]
        [--detector miniature:grounding_dino] [--sam miniature:sam]
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from machine import commit
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, THINGS
from ovref_inference.proposers.config import GroundingDinoConfig, SamConfig
from ovref_inference.proposers.detectors import load_detector
from ovref_inference.proposers.grounded_sam import load_grounded_sam
from ovref_inference.proposers.sam import SamMasks
from ovref_inference.proposers.sam_model import load_sam

LOWEST, THRESHOLDS = 0.1, np.arange(0.1, 0.7, 0.05)
SMALLEST = 12
"""True regions of fewer pixels are not counted: the miniature was not trained on them either."""
RECALL, WANTED_IOU = 0.8, 0.6
BATCH = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--detector", default="miniature:grounding_dino")
    parser.add_argument("--sam", default="miniature:sam")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    settings = GroundingDinoConfig(
        model=arguments.detector, box_threshold=LOWEST, text_threshold=LOWEST
    )
    models = load_grounded_sam(
        settings, SamConfig(model=arguments.sam), device="cpu", batch_size=BATCH
    )
    found = grounded(models, "validation", arguments.scenes)
    by_threshold = {
        round(float(threshold), 2): evaluate(found, float(threshold)) for threshold in THRESHOLDS
    }
    chosen = max(by_threshold, key=lambda threshold: by_threshold[threshold]["f1"])
    results = {
        "what": "GroundingDINO + SAM on held-out scenes, and what batching saves",
        "models": f"{arguments.detector}, {arguments.sam} (the miniature: no figure here is one of "
        "a real model)",
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used, shared with other work",
        "torch": torch.__version__,
        "clock": "CPU time of the process",
        "scenes": arguments.scenes,
        "threshold": chosen,
        "validation_f1": {value: row["f1"] for value, row in by_threshold.items()},
        "test": evaluate(grounded(models, "test", arguments.scenes), chosen),
        "sam": sam_times(arguments.sam, arguments.repeats),
        "grounding_dino": detector_times(arguments.detector, arguments.repeats),
    }
    print(json.dumps(results, indent=1))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "grounding.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "grounding.md").write_text(report(results))


def grounded(models, split, count):
    """Each noun of each scene: whether it is a thing, its true and found masks, their scores."""
    scenes = [render(seed, split) for seed in range(count)]
    nouns = [list(dict.fromkeys(noun.lemma for noun in scene.nouns)) for scene in scenes]
    rows = []
    for start in range(0, count, BATCH):
        part = slice(start, start + BATCH)
        answers = models.find([scene.image_hwc for scene in scenes[part]], nouns[part])
        for scene, names, answer in zip(scenes[part], nouns[part], answers, strict=True):
            for number, name in enumerate(names):
                own = answer.detections.nouns == number
                scores = answer.detections.scores[own]
                rows.append(
                    (name in THINGS, true_masks(scene, name), answer.masks_nhw[own], scores)
                )
    return rows


def true_masks(scene, name):
    """(n, H, W) bool: each thing alone; of stuff all of it."""
    of_class = scene.label_hw == CLASSES.index(name)
    numbers = np.unique(scene.instance_hw[of_class]) if name in THINGS else [None]
    masks = [of_class if n is None else of_class & (scene.instance_hw == n) for n in numbers]
    return np.array([mask for mask in masks if mask.sum() >= SMALLEST]).reshape(-1, *of_class.shape)


def evaluate(rows, threshold):
    """IoU of the paired masks, recall and precision."""
    ious, things, found = [], [], 0
    for is_thing, truth, masks, scores in rows:
        masks = masks[scores > threshold]
        found += len(masks)
        table = np.array([[(t & m).sum() / (t | m).sum() for m in masks] for t in truth])
        best = np.zeros(len(truth))
        if table.size:
            paired, chosen = linear_sum_assignment(table, maximize=True)
            best[paired] = table[paired, chosen]
        ious += best.tolist()
        things += [is_thing] * len(truth)
    ious, things = np.array(ious), np.array(things)
    good = int((ious > 0.5).sum())
    recall, precision = good / len(ious), good / max(1, found)
    return {
        "true_masks": len(ious),
        "found_masks": found,
        "mean_iou": round(float(ious.mean()), 3),
        "mean_iou_things": round(float(ious[things].mean()), 3),
        "mean_iou_stuff": round(float(ious[~things].mean()), 3),
        f"iou_at_recall_{RECALL}": round(float(np.quantile(ious, 1 - RECALL)), 3),
        f"recall_at_iou_{WANTED_IOU}": round(float((ious >= WANTED_IOU).mean()), 3),
        "recall_at_iou_0.5": round(recall, 3),
        "precision_at_iou_0.5": round(precision, 3),
        "f1": round(2 * good / (len(ious) + found), 3),
    }


def sam_times(model, repeats):
    """All boxes of an image at once, and one call for each; with the passes of the encoder."""
    sam = load_sam(model)
    masks, passes = SamMasks(sam), []
    sam.image_encoder.register_forward_hook(lambda *call: passes.append(len(call[1][0])))
    image_hwc = render(0, "test").image_hwc
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 32, (BATCH, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 32, (BATCH, 2))], axis=1)

    def together():
        list(masks.of_boxes([image_hwc], [boxes]))

    def one_by_one():
        for box in boxes:
            list(masks.of_boxes([image_hwc], [box[None]]))

    counts = {}
    for name, run in (("together", together), ("one_by_one", one_by_one)):
        passes.clear()
        run()
        counts[name] = sum(passes)
    return {"boxes": BATCH, "images_encoded": counts, **compared(together, one_by_one, repeats)}


def detector_times(model, repeats):
    """Images with different nouns at once, and one at a time."""
    detector = load_detector(GroundingDinoConfig(model=model), device="cpu")
    scenes = [render(seed, "test") for seed in range(BATCH)]
    images = [scene.image_hwc for scene in scenes]
    nouns = [[noun.lemma for noun in scene.nouns] for scene in scenes]

    def together():
        detector.detect(images, nouns)

    def one_by_one():
        for image_hwc, names in zip(images, nouns, strict=True):
            detector.detect([image_hwc], [names])

    return {"captions": BATCH, **compared(together, one_by_one, repeats)}


def compared(together, one_by_one, repeats):
    """Alternately, after one run each that does not count."""
    seconds = {"together": [], "one_by_one": []}
    for repeat in range(repeats + 1):
        for name, run in (("together", together), ("one_by_one", one_by_one)):
            started = time.process_time()
            run()
            if repeat:
                seconds[name].append(time.process_time() - started)
    ratios = [b / a for a, b in zip(seconds["together"], seconds["one_by_one"], strict=True)]
    return {
        "seconds": {name: round(statistics.median(some), 4) for name, some in seconds.items()},
        "one_by_one_over_together": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def report(results):
    test, sam, dino = results["test"], results["sam"], results["grounding_dino"]
    encoded = sam["images_encoded"]
    lines = [
        "# Grounding: the detector route",
        "",
        f"GroundingDINO + SAM asked for the nouns of {results['scenes']} test scenes' captions; "
        f"{results['models']}. Threshold {results['threshold']}, chosen on validation scenes. A "
        "thing's every true mask, and a stuff's whole one, is paired with at most one found mask "
        "of its noun. Made by `tests/benchmarks/grounding.py`, commit "
        f"{results['commit']}, {results['machine']}.",
        "",
        "| figure | value |",
        "|---|---:|",
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in test.items()),
        "",
        f"At recall {RECALL}, each mask counted has an IoU of at least "
        f"{test[f'iou_at_recall_{RECALL}']} (wanted: {WANTED_IOU}).",
        "",
        "What batching saves, CPU time on one core:",
        "",
        "| | at once | one by one | ratio | range |",
        "|---|---:|---:|---:|---|",
        *(
            f"| {name} | {row['seconds']['together']} s | {row['seconds']['one_by_one']} s | "
            f"{row['one_by_one_over_together']} | {row['range'][0]} to {row['range'][1]} |"
            for name, row in (
                (f"SAM, {sam['boxes']} boxes of one image", sam),
                (f"GroundingDINO, {dino['captions']} images with different nouns", dino),
            )
        ),
        "",
        f"SAM encoded {encoded['together']} image at once and {encoded['one_by_one']} one by one.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
