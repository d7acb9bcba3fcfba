"""FreeDA's own code beside ovref: everything but the backbones, CPU seconds and scores.

    python tests/benchmarks/freeda_side_by_side.py CHECKOUT PHOTOGRAPH [--windows 1] [--repeats 3]
        [--output tests/benchmarks/results]

CHECKOUT is a copy of github.com/aimagelab/freeda. Its `FreeDA.generate_masks` runs as it is, at its
settings for ADE20k, on windows of 448 pixels, one prototype of each of 150 classes; so does
`FreedaSegmenter`. Both get the same superpixel settings, features (1,369 patches of DINOv2
ViT-L/14, random directions that change smoothly over the image) and CLIP embeddings, which stand in
for the backbones' passes and cost nothing. What is left is superpixels, pooling, similarity and the
scores of 150 classes at every pixel of the first windows. Each is run in turn, in one process on
one thread; the median of the CPU seconds counts.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from machine import commit, processor
from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
from ovref_inference.segmenters.superpixels import superpixels
from ovref_inference.segmenters.windows import window_boxes

CLASSES, SIDE, PATCHES, DIM = 150, 448, 37, 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    image = Image.open(arguments.photograph).convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    image_hwc = np.asarray(image)
    boxes = window_boxes(image_hwc.shape[:2], SIDE, SIDE // 2)
    windows = [image_hwc[t:b, left:r] for t, left, b, r in boxes[: arguments.windows]]
    rng = np.random.default_rng(0)
    features = {window.tobytes(): smooth(rng) for window in windows}
    texts_cd, whole_d = unit(rng, (CLASSES, 768)), unit(rng, (768,))
    # Prototypes among the features, so that classes differ from place to place.
    every_nd = np.concatenate([one.reshape(-1, DIM) for one in features.values()])
    prototypes_cd = every_nd[rng.choice(len(every_nd), CLASSES, replace=False)]
    theirs = their_scores(arguments.checkout, features, prototypes_cd, texts_cd, whole_d)
    ours = our_scores(features, prototypes_cd, texts_cd, whole_d)
    found = {"theirs": [], "ours": []}
    for _ in range(arguments.repeats):
        for name, score in (("theirs", theirs), ("ours", ours)):
            started = time.process_time()
            scores = [score(window) for window in windows]
            found[name].append(time.process_time() - started)
            if name == "theirs":
                expected = scores
    gaps = [(a - b).abs() for a, b in zip(expected, scores, strict=True)]
    same = [(a.argmax(0) == b.argmax(0)).float() for a, b in zip(expected, scores, strict=True)]
    results = {
        "commit": commit(),
        "machine": f"{processor()}, one thread, torch {torch.__version__}",
        "windows": len(windows),
        "repeats": arguments.repeats,
        "superpixels": [
            int(superpixels(window, FreedaConfig().superpixels).max()) + 1 for window in windows
        ],
        "cpu_s": {name: statistics.median(seconds) for name, seconds in found.items()},
        "mean_gap": float(torch.stack(gaps).mean()),
        "largest_gap": float(torch.stack(gaps).max()),
        "spread": float(torch.stack(expected).std()),
        "same_label": float(torch.stack(same).mean()),
    }
    path = arguments.output / "freeda_side_by_side.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))
    print(report(results))


def unit(rng, shape):
    values = rng.standard_normal(shape, dtype=np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def smooth(rng):
    """(37, 37, 1024) features that change slowly from patch to patch."""
    coarse = torch.from_numpy(rng.standard_normal((1, DIM, 6, 6), dtype=np.float32))
    return interpolate(coarse, size=(PATCHES, PATCHES), mode="bicubic")[0].permute(1, 2, 0).numpy()


def their_scores(checkout, features, prototypes_cd, texts_cd, whole_d):
    """A window -> (150, 448, 448) scores by the released code."""
    source = checkout / "src"
    for name, place in (
        ("models", "models"),
        ("models.freeda", "models/freeda"),
        ("models.freeda.mask_proposer", "models/freeda/mask_proposer"),
    ):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(source / place)]
    # What it imports and these calls do not use; its registry only keeps the classes.
    registry = types.SimpleNamespace(register_module=lambda: lambda kind: kind)
    normalize = torch.nn.functional.normalize
    for name, content in (
        ("cv2", {}),
        ("models.builder", {"MODELS": registry}),
        ("utils", {"get_logger": None}),
        ("us", {"normalize": lambda t, dim: normalize(t, dim=dim, eps=1e-6)}),
        ("datasets", {"get_template": None}),
        ("einops", {"rearrange": None, "repeat": None}),
        ("einops.layers", {}),
        ("einops.layers.torch", {"Rearrange": None}),
    ):
        sys.modules[name] = module = types.ModuleType(name)
        vars(module).update(content)
    module = importlib.import_module("models.freeda.freeda")
    module.device = torch.device("cpu")
    kind, shown = module.FreeDA, {}

    def features_of(image):
        flat = torch.from_numpy(shown["features"]).reshape(1, -1, DIM)
        return torch.cat([flat[:, :1], flat], dim=1)  # a class token first

    superpixel = {"algorithm": "felzenszwalb", "min_size": 20, "scale": 100, "sigma": 1.0}
    whole = torch.from_numpy(whole_d)[None]
    self = types.SimpleNamespace(
        use_mask_proposer=True, mask_proposer="superpixel", region_pooling=True,
        mask_proposer_algorithm=module.SuperpixelExtractor(superpixel),
        use_category_pre_filtering=False, ensemble_dino_clip=0.8, ensemble_max_mean=1.0,
        ensemble_mode="arithmetic", similarity_type="cosine", use_k_nn=False, k_nn=None,
        visual_category_pre_filtering=None, last_attn_keys=False,
        save_clip_features=False, save_clip_features_dir=None,
        save_dino_features=False, save_dino_features_dir=None,
        clip_model=types.SimpleNamespace(encode_image=lambda image: whole),
        clip_image_preprocess=lambda image: image, backbone_transforms=lambda image: image,
        backbone_model=types.SimpleNamespace(forward_features=features_of),
        masker=module.FreeDAMasker(1.0, "cosine"),
    )  # fmt: skip
    for name in ("get_backbone_region_similarities", "replace_covered_pixel_similarities"):
        setattr(self, name, types.MethodType(getattr(kind, name), self))

    def score(window_hwc):
        shown["features"] = features[window_hwc.tobytes()]
        bgr = torch.from_numpy(window_hwc[..., ::-1].copy()).permute(2, 0, 1)[None].float()
        scores, *_ = kind.generate_masks(
            self, bgr, [{"ori_filename": "window"}], torch.from_numpy(texts_cd),
            torch.from_numpy(prototypes_cd)[:, None], [""] * CLASSES,
        )  # fmt: skip
        return scores[0]

    return score


def our_scores(features, prototypes_cd, texts_cd, whole_d):
    """A window -> (150, 448, 448) scores by `FreedaSegmenter`."""
    visual = types.SimpleNamespace(
        encode=lambda crops: np.stack([features[crop.tobytes()] for crop in crops])
    )
    text = types.SimpleNamespace(encode_images=lambda crops: np.stack([whole_d] * len(crops)))
    segmenter = FreedaSegmenter.__new__(FreedaSegmenter)
    segmenter.visual, segmenter.text, segmenter.config = visual, text, FreedaConfig(windows=None)
    directions_cd = prototypes_cd / np.linalg.norm(prototypes_cd, axis=1, keepdims=True)
    prototypes = Prototypes(
        vectors_nkd=directions_cd[:, None], counts=np.ones(CLASSES, np.int64), nouns=((),) * CLASSES
    )

    def score(window_hwc):
        (found,) = segmenter._score(
            [window_hwc], prototypes=prototypes, background=None, texts_cd=texts_cd,
            present=np.ones(CLASSES, bool),
        )  # fmt: skip
        return found.pixels(slice(0, CLASSES))

    return score


def report(results):
    theirs, ours = (results["cpu_s"][name] for name in ("theirs", "ours"))
    count, numbers = results["windows"], ", ".join(map(str, results["superpixels"]))
    return f"""# FreeDA's own code

Superpixels ({numbers}), pooling, similarity and scores of 150 classes at every pixel of {count}
window(s) of 448 pixels of one photograph: FreeDA's released code (aimagelab/freeda,
`generate_masks`) and ovref on the same features, without the backbones. CPU seconds, the median of
{results["repeats"]}; {results["machine"]}; commit {results["commit"]}. Made by
`tests/benchmarks/freeda_side_by_side.py`, whose first lines say how.

| | CPU s a window | windows/s |
|---|---:|---:|
| FreeDA's code | {theirs / count:.2f} | {count / theirs:.3f} |
| ovref | {ours / count:.2f} | {count / ours:.3f} |

FreeDA's code takes {theirs / ours:.1f} times as long. Scores differ by {results["mean_gap"]:.1e} on
average and {results["largest_gap"]:.1e} at most, where they vary by {results["spread"]:.1e}
(standard deviation); {100 * results["same_label"]:.1f}% of pixels have the same best class among
150 random ones. It pools by the values of a superpixel's mask at the centres of patches, and a
superpixel between them keeps the scores of its patches; ovref pools by the part of each patch that
a superpixel covers.
"""


if __name__ == "__main__":
    main()
