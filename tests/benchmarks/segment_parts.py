"""Segmenting one photograph at FOSSIL's settings on a CPU: the backbones and everything else.

A photograph of 422 x 640 pixels, 150 classes of 10 prototypes, windows of 448 at stride 224 of the
image at a short side of 448; DINOv2 ViT-L/14 at 518 pixels, masks of DINO ViT-B/8 at 480 pixels
moved to edges by the CRF. Weights are random.

    python tests/benchmarks/segment_parts.py [--photograph FILE] [--output tests/benchmarks/results]

The floor is the time of one layer of each backbone at its full size, times its layers, times the
windows; what comes before and after the layers is not in it. The rest runs with stand-ins that
give random features at once, and with masks cut out of the photograph's colours in place of
OpenCut's, so that its share can be measured without the backbones' minutes. All figures are CPU
seconds of the process, which other load on the machine changes little; one thread.
"""

import argparse
import datetime
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

import segment_windows
from machine import commit, processor
from ovref_inference.encoders.load import VisualEncoder
from ovref_inference.pixels import Pixels
from ovref_inference.proposers import load as proposers
from ovref_inference.segmenters import fossil as segmenters
from ovref_inference.segmenters import windows
from ovref_inference.segmenters.windows import WindowConfig
from segment_windows import IMAGENET, Collection, Parts, by_size, class_names, photograph

CLASSES = 150
SIZE_HW = (422, 640)
BACKBONES = (
    (
        "DINOv2 ViT-L/14",
        transformers.Dinov2Config(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518,
            patch_size=14,
        ),
        518,
    ),
    ("DINO ViT-B/8", transformers.ViTConfig(image_size=480, patch_size=8), 480),
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photograph", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.cpu_count = lambda: 1  # one field of the CRF after another, so that parts can be told apart
    segment_windows.clock = lambda device: time.process_time()
    image_hwc = photograph(SIZE_HW, seed=0)
    if arguments.photograph:
        image_hwc = np.asarray(Image.open(arguments.photograph).convert("RGB"))
    cpu = torch.device("cpu")
    layers = [one_layer(config, side) for _, config, side in BACKBONES]
    parts, masks = rest(image_hwc, cpu)
    windows = parts.calls["scores of patches and regions of a window"]
    print({name: round(s, 2) for name, s in by_size(parts.seconds)}, flush=True)
    floor = {
        f"{name}, {side} pixels": windows * config.num_hidden_layers * seconds
        for (name, config, side), seconds in zip(BACKBONES, layers, strict=True)
    }
    tera = {
        f"{name}, {side} pixels": windows * operations(config, side) / 1e12
        for name, config, side in BACKBONES
    }
    results = {
        "what": "segmenting one photograph, CPU seconds by part",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, one thread",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)},
        "size_hw": image_hwc.shape[:2],
        "windows": windows,
        "masks": masks,
        "classes": CLASSES,
        "floor": floor,
        "tera_operations": tera,
        "rest": dict(parts.seconds),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "segment_parts"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))
    print(report(results))


def one_layer(config, side):
    """CPU seconds of one layer for one image, the better of two runs."""
    kind = transformers.Dinov2Model if config.model_type == "dinov2" else transformers.ViTModel
    settings = {name: value for name, value in config.to_dict().items() if "out_" not in name}
    one = type(config)(**settings | {"num_hidden_layers": 1, "stage_names": None})
    model = kind(one).eval().requires_grad_(False)
    layer = next(m for m in model.modules() if type(m).__name__ in ("Dinov2Layer", "ViTLayer"))
    tokens_nld = torch.randn(1, 1 + (side // config.patch_size) ** 2, config.hidden_size)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            started = time.process_time()
            layer(tokens_nld)
            seconds.append(time.process_time() - started)
    return min(seconds)


def operations(config, side):
    """Multiplications and additions of all layers for one image."""
    tokens, width = 1 + (side // config.patch_size) ** 2, config.hidden_size
    products = 2 * tokens * (4 + 2 * 4) * width**2  # of weights; the middle is 4 times as wide
    attention = 2 * 2 * tokens**2 * width
    return config.num_hidden_layers * (products + attention)


def stand_in(side, patch, dim, cpu):
    """An encoder whose backbone answers at once; its preparation of images is the real one."""
    tokens_ld = torch.randn((side // patch) ** 2, dim)
    return VisualEncoder(
        forward=lambda pixels: tokens_ld.expand(len(pixels), -1, -1),
        dim=dim,
        size_hw=(side, side),
        patch_size=patch,
        images=Pixels(*IMAGENET, "bicubic", cpu, torch.float32),
        batch_size=8,
    )


def colour_masks(image_hwc, grid=60, masks=5):
    """(masks, grid, grid) bool: patches by the nearest of some colours of the photograph; the
    first colour's stay without a mask."""
    small = Image.fromarray(image_hwc).resize((grid, grid), Image.Resampling.BOX)
    colours_nc = np.asarray(small, np.float32).reshape(-1, 3)
    order = np.argsort(colours_nc.sum(1))
    centres = colours_nc[order[np.linspace(0, len(order) - 1, masks + 1).astype(int)]]
    nearest = ((colours_nc[:, None] - centres) ** 2).sum(2).argmin(1).reshape(grid, grid)
    return nearest == np.arange(1, masks + 1)[:, None, None]


def rest(image_hwc, cpu):
    """Seconds of everything else by part, and the masks of each window."""
    dinov2, keys = stand_in(518, 14, 1024, cpu), stand_in(480, 8, 768, cpu)
    collection = Collection(CLASSES, 1024)
    masks = []

    class Cutter:
        """Keys as the real ones, and the photograph that they are of."""

        def encode(self, images):
            self.images = images
            return keys.encode(images)

    cutter = Cutter()
    proposers.opencut = lambda *_: [colour_masks(image) for image in cutter.images]
    propose = proposers.opencut_proposer(cutter, device="cpu")

    def counted(images):
        found = propose(images)
        masks.extend(len(one) for one in found)
        return found

    class Texts:
        def encode(self, texts):
            return np.random.default_rng(0).standard_normal((len(texts), 768), dtype=np.float32)

    config = segmenters.FossilConfig(windows=WindowConfig(), floor=None)
    segmenter = segmenters.FossilSegmenter(collection, dinov2, Texts(), counted, config)
    names = class_names(CLASSES)
    segmenters.supported_classes = lambda *_: [None] * CLASSES
    segmenters.missing_names = lambda *_: ()
    prototypes = collection.fossil_prototypes(
        np.zeros((CLASSES, 768), np.float32), n=150, k=10, seed=0
    )
    segmenter.prepare = lambda names: prototypes
    parts = Parts(cpu)
    places = [
        (Pixels, "__call__", "preparing images"),
        (VisualEncoder, "encode", "features to arrays"),
        (proposers, "to_edges", "CRF"),
        (segmenters, "pool_regions", "pooling regions"),
        (segmenters, "prototype_scores", "similarity"),
        (windows, "score_images", "windows"),
        (windows, "labelled", "scores to pixels, windows averaged, best class"),
    ]
    per_window = segmenters.crop_scores

    def crop_scores(crops, **options):
        parts.calls["scores of patches and regions of a window"] += len(crops)
        return per_window(crops, **options)

    segmenters.crop_scores = parts.timed(crop_scores, "scores of patches and regions")
    segmenter.segment([image_hwc], names)  # once, which does not count
    masks.clear()
    parts.seconds.clear()
    parts.calls.clear()
    with parts.wrapped(places):
        started = time.process_time()
        segmenter.segment([image_hwc], names)
        total = time.process_time() - started
    parts.seconds["the rest"] = total - sum(parts.seconds.values())
    return parts, masks


def report(results):
    floor, rest = sum(results["floor"].values()), sum(results["rest"].values())
    height, width = results["size_hw"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Segmenting a photograph, by part",
        "",
        f"One photograph of {height} x {width} pixels at FOSSIL's settings: {results['windows']} "
        f"windows, {results['classes']} classes of 10 prototypes, masks of the windows: "
        f"{' + '.join(map(str, results['masks']))}. CPU seconds; {results['machine']}; {versions}; "
        f"random weights; commit {results['commit']}, {results['date']}. OpenCut's cuts are left "
        "out. Made by `tests/benchmarks/segment_parts.py`.",
        "",
        "| | CPU seconds | % of the backbones |",
        "|---|---:|---:|",
        *(f"| {name}, {results['windows']} windows: {results['tera_operations'][name]:.2f} x "
          f"10^12 operations | {s:.1f} | |" for name, s in results["floor"].items()),
        f"| **the backbones: the floor** | {floor:.1f} | 100 |",
        *(f"| {name} | {s:.2f} | {100 * s / floor:.2f} |" for name, s in by_size(results["rest"])),
        f"| **everything else but OpenCut** | {rest:.2f} | {100 * rest / floor:.1f} |",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
