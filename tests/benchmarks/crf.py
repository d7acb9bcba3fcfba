"""The CRF's mean field against pydensecrf, the reference implementation's binding, on photographs.

    OMP_NUM_THREADS=1 python tests/benchmarks/crf.py

Needs scikit-image, whose photographs these are, and pydensecrf; version 1.1 of the package
pydensecrf2 builds with Python 3.11 (Cython 0.29.36 and a compiler). Both are given the same shares
of each pixel, from masks on a grid of 8 pixels: patches by their brightness. Times are CPU seconds
of one thread, the least of three turns. Writes results/crf_pydensecrf.json.
"""

import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydensecrf.densecrf
import scipy
import skimage
from PIL import Image

from ovref_inference.proposers.config import CrfConfig
from ovref_inference.proposers.crf import mean_field
from ovref_inference.proposers.opencut import shares

SIZE_HW = (480, 640)
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
LABELS = (2, 4, 8)
TURNS = 3


def reference(unary_nhw: np.ndarray, image_hwc: np.ndarray, config: CrfConfig) -> np.ndarray:
    """What `mean_field` gives, by pydensecrf; distances are of images of 480 pixels."""
    labels, height, width = unary_nhw.shape
    field = pydensecrf.densecrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(np.array(-unary_nhw.reshape(labels, -1), dtype=np.float32))
    if config.smoothness_weight:
        field.addPairwiseGaussian(sxy=config.smoothness_distance, compat=config.smoothness_weight)
    field.addPairwiseBilateral(
        sxy=config.appearance_distance, srgb=config.appearance_colour,
        rgbim=np.array(image_hwc), compat=config.appearance_weight,
    )  # fmt: skip
    return np.array(field.inference(config.steps)).reshape(labels, height, width)


def masks_by_brightness(image_hwc: np.ndarray, labels: int) -> np.ndarray:
    """(labels - 1, h, w) bool: patches of 8 pixels, cut at equal shares of their brightness."""
    grey = image_hwc.mean(2).reshape(SIZE_HW[0] // 8, 8, SIZE_HW[1] // 8, 8).mean((1, 3))
    number_hw = np.digitize(grey, np.quantile(grey, np.arange(1, labels) / labels))
    return number_hw == np.arange(1, labels)[:, None, None]


def measured(name: str, labels: int) -> dict[str, Any]:
    """Seconds of both, and how much they differ."""
    photograph = Image.fromarray(getattr(skimage.data, name)())
    image_hwc = np.asarray(photograph.convert("RGB").resize(SIZE_HW[::-1]))
    unary_nhw = shares(masks_by_brightness(image_hwc, labels), SIZE_HW).numpy()
    config, seconds, found = CrfConfig(), {"ours": [], "pydensecrf": []}, {}
    for _ in range(TURNS):
        for side, infer in (("ours", mean_field), ("pydensecrf", reference)):
            began = time.process_time()
            found[side] = infer(unary_nhw, image_hwc, config)
            seconds[side].append(time.process_time() - began)
    ours, theirs = found["ours"], found["pydensecrf"]
    before = unary_nhw.argmax(0)
    return {
        "photograph": name,
        "labels": labels,
        "ours_cpu_s": round(min(seconds["ours"]), 3),
        "pydensecrf_cpu_s": round(min(seconds["pydensecrf"]), 3),
        "labels_differ": float((ours.argmax(0) != theirs.argmax(0)).mean()),
        "labels_changed_by_the_field": float((before != theirs.argmax(0)).mean()),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "mean_difference": float(np.abs(ours - theirs).mean()),
    }


def main() -> None:
    rows = []
    for name in PHOTOGRAPHS:
        for labels in LABELS:
            rows.append(measured(name, labels))
            print(rows[-1], flush=True)
    result = {
        "machine": platform.machine(),
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "crf_pydensecrf.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
