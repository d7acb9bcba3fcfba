"""Which rule makes masks of heatmaps best: attribution of drawn scenes against their true masks.

Validation scenes of the miniature are noised to a few levels and shown to its UNet under their own
captions; the heatmaps are averaged over the levels, as generation averages over its steps, and made
into masks by each rule. Figures are of the miniature and say nothing about real models.

    python tests/benchmarks/binarisation.py [--output tests/benchmarks/results] [--scenes 64]
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from attribute_images import attribute_images
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, STUFF
from ovref.models.loading import load_pipeline
from ovref.models.tokens import mentions, token_positions
from ovref.ops.binarisation import BinariseRule, binarise
from ovref.records import YES, Noun
from ovref_miniature import weights_path

MODEL = "miniature:stable_diffusion"
TIMESTEPS = (50, 200, 350, 500, 650, 800, 950)
RULES = [
    BinariseRule(method=method, threshold=threshold, band=0.0)
    for method in ("minmax", "standardised_sigmoid")
    for threshold in (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7)
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--scenes", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    maps, truth, stuff = attributed(arguments.scenes)
    results = {
        "model": f"{MODEL} (the miniature: no figure here is one of a real model)",
        "weights": weights_digest(),
        "scenes": arguments.scenes,
        "split": "validation",
        "regions": len(maps),
        "timesteps": TIMESTEPS,
        "rules": [measured(rule, maps, truth, stuff) for rule in RULES],
    }
    fields = list(results["rules"][0])
    lines = [
        "# Binarisation",
        "",
        f"Masks from attribution heatmaps against true masks: {results['regions']} regions of "
        f"{results['scenes']} validation scenes, {results['model']}. `precision` is the share of "
        "a mask that is right, the purity of what is pooled. UNet weights "
        f"{results['weights']}. Made by `tests/benchmarks/binarisation.py`.",
        "",
        "| " + " | ".join(field.replace("_", " ") for field in fields) + " |",
        "|---" * len(fields) + "|",
        *(
            "| " + " | ".join(str(row[field]) for field in fields) + " |"
            for row in results["rules"]
        ),
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "binarisation.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "binarisation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def weights_digest():
    """Start of the SHA-256 of the UNet's weights: which training of the miniature was measured."""
    weights = weights_path("stable_diffusion") / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def attributed(count):
    """Heatmaps (n, h, w), true masks (n, H, W) bool, and which are of stuff (n,) bool."""
    pipeline = load_pipeline(MODEL, revision=None, scheduler="ddim", dtype="float32", device="cpu")
    maps, truth, stuff = [], [], []
    for start in range(0, count, 32):
        scenes = [render(seed, "validation") for seed in range(start, min(start + 32, count))]
        said = [
            mentions(s.caption, [Noun(text=n.lemma, start=n.start, end=n.end) for n in s.nouns])
            for s in scenes
        ]
        positions = [
            token_positions(pipeline.tokenizer, scene.caption, list(nouns.values()))
            for scene, nouns in zip(scenes, said, strict=True)
        ]
        images = np.stack([scene.image_hwc for scene in scenes])
        captions = [scene.caption for scene in scenes]
        heatmaps = attribute_images(pipeline, images, captions, positions, TIMESTEPS, seed=start)
        for scene, nouns, heatmaps_nhw in zip(scenes, said, heatmaps, strict=True):
            for name, heatmap_hw in zip(nouns, heatmaps_nhw, strict=False):
                maps.append(heatmap_hw)
                truth.append(scene.label_hw == CLASSES.index(name))
                stuff.append(name in STUFF)
    return np.stack(maps), np.stack(truth), np.array(stuff)


def measured(rule, maps, truth, stuff):
    masks = binarise(maps, truth.shape[1:], rule) == YES
    hit, either = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    iou, precision = hit / np.maximum(either, 1), hit / np.maximum(masks.sum((1, 2)), 1)
    return {
        "method": rule.method,
        "threshold": rule.threshold,
        "iou": round(float(iou.mean()), 3),
        "iou_things": round(float(iou[~stuff].mean()), 3),
        "iou_stuff": round(float(iou[stuff].mean()), 3),
        "precision": round(float(precision.mean()), 3),
        "area": round(float(masks.mean()), 3),
        "true_area": round(float(truth.mean()), 3),
    }


if __name__ == "__main__":
    main()
