"""Segmenting photographs over sliding windows: seconds by part, models of full size.

Windows of 448 pixels, stride 224, of images resized to a short side of 448 (FOSSIL section 4.1),
150 classes of 10 prototypes, DINOv2 ViT-L/14 at 518 pixels; proposals by OpenCut on the keys of
DINO ViT-B/8 at 480 pixels. Weights are random, as are the prototypes: times are those of the real
ones, labels mean nothing. Keys of a random backbone would be cut unlike real ones, so after its
pass, which is timed, they are replaced by keys of known shape: the mean colour of each patch,
projected, with noise. The images are drawn: coloured blobs with noise.

    python tests/benchmarks/segment_windows.py [--device cuda] [--dtype float16] [--small]
        [--settings none opencut ...] [--output tests/benchmarks/results]

The settings, in the order they are given:

- none: each patch alone;
- opencut: `opencut_proposer` as it is by default, but for the CRF;
- opencut_together: the same with memory for all graphs of an image at once;
- clip: text only, dense features (values) of CLIP ViT-L/14 at 448 pixels;
- opencut_crf: the default as a whole, masks moved to the edges by the CRF, which runs on the CPU;
  one run of the first image.

Each setting and image is run once, which does not count but for opencut_crf; then the whole is
timed; then it is run with public callables wrapped, the device waited for before and after each: a
part's time is its own, without that of the parts it calls. What is left is "the rest". Files are
written after every figure.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
import traceback
import types
from pathlib import Path

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image
from scipy.ndimage import gaussian_filter

from bench import presets
from ovref_inference.collection.clustering import spherical_kmeans
from ovref_inference.collection.prototypes import Prototypes, stacked
from ovref_inference.collection.retrieve import TEMPLATES, class_embeddings
from ovref_inference.encoders.clip_towers import resize_positions, vit_features
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import TextEncoder, VisualEncoder, load_visual_encoder
from ovref_inference.pixels import Pixels
from ovref_inference.proposers import load as proposers
from ovref_inference.proposers import opencut
from ovref_inference.proposers.config import CrfConfig
from ovref_inference.segmenters import fossil as segmenters
from ovref_inference.segmenters import windows as window_scores
from ovref_inference.segmenters.windows import WindowConfig

SETTINGS = ["none", "opencut", "opencut_together", "clip", "opencut_crf"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ALL_GRAPHS = 2**34
"""Bytes for graphs: 18 of 3,600 patches, three windows and six thresholds, take 5.6e9."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--enough", type=float, default=1.5, help="seconds of repeats")
    parser.add_argument("--small", action="store_true", help="tiny models and images: a rehearsal")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = SMALL if arguments.small else FULL
    results = {
        "what": "segmenting over sliding windows, by part"
        + (" (a rehearsal with tiny models: its times mean nothing)" if arguments.small else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; "
        + (torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np, open_clip)},
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "classes": arguments.classes,
        "preparation": {},
        "rows": [],
    }

    def save():
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = arguments.output / f"segment_windows_{device.type}"
        name.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        name.with_suffix(".md").write_text(report(results))

    started = time.perf_counter()
    models = Models(sizes, arguments, device)
    names = class_names(arguments.classes)
    results["preparation"] = {"making models": time.perf_counter() - started}
    class_embeddings(models.text, names)  # warm
    now = clock(device)
    embeddings = class_embeddings(models.text, names)
    results["preparation"]["text encoding"] = clock(device) - now
    models.collection.fossil_prototypes(embeddings, n=150, k=10, seed=0)
    results["preparation"]["k-means of references"] = clock(device) - now
    results["preparation"]["k-means of references"] -= results["preparation"]["text encoding"]
    print(results["preparation"], flush=True)
    save()
    for setting in arguments.settings:
        segmenter = models.segmenter(setting)
        prepare = segmenter.texts if setting == "clip" else segmenter.prepare
        prepare(names)
        once = setting == "opencut_crf"
        for size_hw in sizes["images"][: 1 if once else None]:
            image_hwc = photograph(size_hw, seed=0)
            try:
                row = measured(models, segmenter, image_hwc, names, device, arguments, once)
            except Exception as error:  # the other settings are worth having
                traceback.print_exc()
                results.setdefault("errors", []).append(f"{setting}, {size_hw}: {error!r}")
                save()
                continue
            row |= {"setting": setting, "size_hw": list(size_hw)}
            results["rows"].append(row)
            save()
            print(
                f"{setting} {size_hw[0]} x {size_hw[1]}: {row['images_a_second']:.2f} images/s; "
                + ", ".join(f"{n} {s * 1e3:.0f} ms" for n, s in by_size(row["parts"])),
                flush=True,
            )
    print(report(results))
    if "errors" in results:
        raise SystemExit(1)


def class_names(count):
    """Nouns of the collection, so that every class has references of its own."""
    return [f"thing number {number}" for number in range(count)]


def measured(models, segmenter, image_hwc, names, device, arguments, once):
    """Seconds for one image: the whole, and by part."""
    encoders = {"DINOv2": models.dinov2, "DINO": models.dino, "CLIP": models.clip}
    row = seconds_by_part(encoders, segmenter, [image_hwc], names, device)
    seconds = [row["seconds_by_part"]]
    if not once:
        seconds = []
        while len(seconds) < arguments.repeats and sum(seconds) < arguments.enough:
            started = clock(device)
            segmenter.segment([image_hwc], names)
            seconds.append(clock(device) - started)
        row = seconds_by_part(encoders, segmenter, [image_hwc], names, device)
    return row | {"seconds": seconds, "images_a_second": 1 / statistics.median(seconds)}


FULL = {
    "images": [(480, 640), (1080, 1920)],
    "dinov2": lambda: presets.backbones()["dinov2_large"][0](),
    "dinov2_side": 518,
    "dino": {"image_size": 224, "patch_size": 8},  # the rest of ViT-B are ViTConfig's defaults
    "dino_side": 480,
    "clip": {},
    "clip_side": 448,
    "windows": WindowConfig(),
}
SMALL = {
    "images": [(60, 80), (120, 210)],
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
        )
    ),
    "dinov2_side": 70,
    "dino": {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "intermediate_size": 64},
    "dino_side": 112,
    "clip": {"width": 64, "layers": 2, "heads": 1},
    "clip_side": 56,
    "windows": WindowConfig(short_side=56, crop=56, stride=28),
}  # fmt: skip


class Models:
    """Everything with weights, made once."""

    def __init__(self, sizes, arguments, device):
        dtype = getattr(torch, arguments.dtype)
        self.windows, self.device = sizes["windows"], device
        torch.manual_seed(0)
        self.dinov2 = dinov2_encoder(sizes, device, dtype)
        with torch.device(device):
            clip = clip_model(sizes["clip"]).eval().requires_grad_(False)
            visual = clip_model(sizes["clip"]).eval().requires_grad_(False).visual
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.text = TextEncoder(
            clip,
            open_clip.get_tokenizer("ViT-L-14-quickgelu"),
            Pixels(mean, std, "bicubic", device, torch.float32),
            256,
        )
        side = sizes["clip_side"]
        resize_positions(visual, (side // 14, side // 14))
        self.clip = VisualEncoder(
            forward=vit_features(visual.to(dtype), "values"),
            dim=self.text.dim,
            size_hw=(side, side),
            patch_size=14,
            images=Pixels(mean, std, "bicubic", device, dtype),
            batch_size=32,
        )
        self.dino = dino_encoder(sizes, device, arguments.dtype)
        self.keys = ShapedKeys(self.dino)
        self.collection = Collection(arguments.classes, self.dinov2.dim)

    def segmenter(self, setting):
        if setting == "none":
            proposer = proposers.no_proposals
        elif setting == "clip":
            return segmenters.TextOnlySegmenter(
                self.clip, self.text, proposers.no_proposals, windows=self.windows
            )
        else:
            more = {"graph_bytes": ALL_GRAPHS} if setting == "opencut_together" else {}
            proposer = proposers.opencut_proposer(
                self.keys,
                crf=CrfConfig() if setting == "opencut_crf" else None,
                device=str(self.device),
                **more,
            )
        config = segmenters.FossilConfig(windows=self.windows)
        return segmenters.FossilSegmenter(self.collection, self.dinov2, self.text, proposer, config)


def dinov2_encoder(sizes, device, dtype):
    """DINOv2 with random weights."""
    with torch.device(device):
        model = sizes["dinov2"]().eval().requires_grad_(False).to(dtype)
    return VisualEncoder(
        forward=lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 1:],
        dim=model.config.hidden_size,
        size_hw=(sizes["dinov2_side"],) * 2,
        patch_size=14,
        images=Pixels(*IMAGENET, "bicubic", device, dtype),
        batch_size=32,
    )


def dino_encoder(sizes, device, precision):
    """DINO with random weights; its features are keys."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            vit = transformers.ViTModel(
                transformers.ViTConfig(**sizes["dino"]), add_pooling_layer=False
            )
        vit.save_pretrained(folder)
        processor = {"image_processor_type": "ViTImageProcessor", "resample": 3,
                     "image_mean": IMAGENET[0], "image_std": IMAGENET[1]}  # fmt: skip
        Path(folder, "preprocessor_config.json").write_text(json.dumps(processor))
        settings = VisualEncoderConfig(
            model=folder, size_hw=(sizes["dino_side"],) * 2, features="keys", precision=precision
        )
        return load_visual_encoder(settings, device=str(device))


def clip_model(smaller):
    """CLIP ViT-L/14 as open_clip makes it, or a smaller one, with random weights."""
    settings = open_clip.get_model_config("ViT-L-14-quickgelu")
    if smaller:
        settings["embed_dim"] = smaller["width"]
        settings["vision_cfg"] |= {"width": smaller["width"], "layers": smaller["layers"],
                                   "image_size": 28, "head_width": 32}  # fmt: skip
        settings["text_cfg"] |= smaller
    return open_clip.CLIP(**settings)


class Collection:
    """Stands in for `ReferenceCollection`: random references in memory, 150 for each class.

    Retrieving them by text needs faiss and is left out; clustering them is what the real one does.
    """

    url = "random references"
    manifest = types.SimpleNamespace(templates=TEMPLATES)

    def __init__(self, classes, dim, references=150):
        rng = np.random.default_rng(0)
        self.nouns = class_names(classes)
        self.noun_counts = np.full(classes, references)
        centres = rng.standard_normal((classes, 1, dim), dtype=np.float32)
        self.made = {}
        self.of_class = centres + rng.standard_normal((classes, references, dim), dtype=np.float32)

    def fossil_prototypes(self, embeddings, *, n, k, seed):
        """Remembered, so that not every segmenter does it again."""
        asked = (len(embeddings), n, k, seed)
        if asked not in self.made:
            own = self.of_class[: len(embeddings), :n]
            self.made[asked] = stacked(
                [spherical_kmeans(vectors, k, seed=seed) for vectors in own],
                own.shape[2],
            )
        vectors_nkd, counts = self.made[asked]
        return Prototypes(vectors_nkd=vectors_nkd, counts=counts, nouns=((),) * len(counts))


class ShapedKeys:
    """The backbone's pass, and then keys as if it saw things: by the colour of each patch."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.made = {}
        rng = np.random.default_rng(0)
        self.projection = rng.standard_normal((3, encoder.dim), dtype=np.float32)

    def encode(self, images):
        keys_nhwd = self.encoder.encode(images)
        for number, image_hwc in enumerate(images):
            keys_nhwd[number] = self.shaped(image_hwc)
        return keys_nhwd

    def shaped(self, image_hwc):
        """Remembered, so that a second run has them at once."""
        name = hashlib.sha1(image_hwc.tobytes()).digest()
        if name not in self.made:
            small = Image.fromarray(image_hwc).resize(
                self.encoder.grid_hw[::-1], Image.Resampling.BOX
            )
            colours_hwc = np.asarray(small, dtype=np.float32)
            colours_hwc -= colours_hwc.mean((0, 1))
            keys_hwd = colours_hwc / colours_hwc.std() @ self.projection
            rng = np.random.default_rng(0)
            self.made[name] = keys_hwd + rng.standard_normal(keys_hwd.shape, dtype=np.float32)
        return self.made[name]


def photograph(size_hw, seed):
    """(H, W, 3) uint8: blobs of eight colours, shaded, with noise."""
    rng = np.random.default_rng(seed)
    grid_hw = (size_hw[0] // 4, size_hw[1] // 4)
    fields = rng.standard_normal((8, *grid_hw), dtype=np.float32)
    fields = np.stack([gaussian_filter(field, min(grid_hw) / 12) for field in fields])
    fields /= fields.std((1, 2), keepdims=True)
    label_hw = fields.argmax(0)
    colours = rng.uniform(20, 235, (8, 3))
    image_hwc = colours[label_hw] + 12 * fields[:3].transpose(1, 2, 0)
    image_hwc = np.asarray(
        Image.fromarray(image_hwc.clip(0, 255).astype(np.uint8)).resize(size_hw[::-1])
    )
    noisy = image_hwc + rng.normal(0, 6, image_hwc.shape)
    return noisy.clip(0, 255).astype(np.uint8)


class Parts:
    """Seconds of wrapped callables, each without those it calls."""

    def __init__(self, device, seconds_of=None):
        self.device, self.clock = device, seconds_of or clock
        self.seconds = collections.defaultdict(float)
        self.calls = collections.Counter()
        self.inner = [0.0]

    def timed(self, function, part):
        def call(*args, **kwargs):
            started = self.clock(self.device)
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = self.clock(self.device) - started
                self.seconds[part] += took - self.inner.pop()
                self.inner[-1] += took
                self.calls[part] += 1

        return call

    @contextlib.contextmanager
    def wrapped(self, places):
        """`places`: (owner, name of its attribute, part)."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in places:
                own = vars(owner)[name]
                stack.callback(setattr, owner, name, own)
                setattr(owner, name, self.timed(own, part))
            yield self


def seconds_by_part(encoders, segmenter, images, names, device, seconds_of=None):
    """One run with everything wrapped.

    Args:
        encoders: name of a part -> the encoder whose passes it is.
        seconds_of: the time on a device; None for wall time.
    """
    seconds_of = seconds_of or clock
    parts, graphs = Parts(device, seconds_of), []
    places = [
        (Pixels, "__call__", "preparing images"),
        *((encoder, "forward", part) for part, encoder in encoders.items()),
        (VisualEncoder, "encode", "features to the CPU"),
        (ShapedKeys, "shaped", "shaping keys (not in the product)"),
        (opencut, "second_eigenvectors", "OpenCut: eigenvectors"),
        (opencut, "maskcut", "OpenCut: graphs"),
        (opencut, "refine", "OpenCut: refining masks"),
        (proposers, "opencut", "OpenCut: the rest"),
        (proposers, "upsample_masks", "masks to pixels"),
        (proposers, "to_edges", "CRF"),
        (segmenters, "pool_regions", "pooling regions"),
        (segmenters, "prototype_scores", "similarity"),
        (segmenters, "crop_scores", "scores of patches and regions"),
        (window_scores, "labelled", "scores to pixels, windows averaged, best class"),
    ]
    cut = opencut.second_eigenvectors
    masks = []
    pool = segmenters.pool_regions

    def counted(links_gnn, *args, **kwargs):
        graphs.append(len(links_gnn))
        return cut(links_gnn, *args, **kwargs)

    def pooled(features_hwd, masks_nhw, *args):
        masks.append(len(masks_nhw))
        return pool(features_hwd, masks_nhw, *args)

    try:
        opencut.second_eigenvectors, segmenters.pool_regions = counted, pooled
        with parts.wrapped(places):
            started = seconds_of(device)
            segmenter.segment(images, names)
            total = seconds_of(device) - started
    finally:
        opencut.second_eigenvectors, segmenters.pool_regions = cut, pool
    parts.seconds["the rest"] = total - sum(parts.seconds.values())
    return {
        "seconds_by_part": total,
        "parts": dict(parts.seconds),
        "calls": dict(parts.calls),
        "graphs": graphs,
        "masks_of_windows": masks,
    }


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def by_size(parts):
    return sorted(((n, s) for n, s in parts.items() if s >= 5e-4), key=lambda entry: -entry[1])


def report(results):
    rows = results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    names = list(dict.fromkeys(name for row in rows for name, _ in by_size(row["parts"])))
    titles = [f"{row['setting']} {row['size_hw'][0]} x {row['size_hw'][1]}" for row in rows]

    def line(name, cells):
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [
        "# Sliding windows",
        "",
        f"{results['what'].capitalize()}: {results['classes']} classes, {results['dtype']}. "
        f"{results['machine']}, {results['threads']} threads; {versions}. Random weights; wall "
        "time in milliseconds, one image at a time. Made by `tests/benchmarks/segment_windows.py`, "
        "whose first lines say how.",
        "",
        line("", titles),
        "|---|" + "---:|" * len(rows),
        line("images a second", [f"{row['images_a_second']:.2f}" for row in rows]),
        line("the whole", [f"{1e3 * statistics.median(r['seconds']):.0f}" for r in rows]),
        line("the whole, by part", [f"{1e3 * r['seconds_by_part']:.0f}" for r in rows]),
        *(line(name, [f"{1e3 * r['parts'].get(name, 0):.1f}" for r in rows]) for name in names),
        line("windows", [str(r["calls"].get("scores to the windows' pixels", 0)) for r in rows]),
        line("graphs cut", [f"{sum(r['graphs'])} in {len(r['graphs'])}" for r in rows]),
        line("masks", ["+".join(map(str, r["masks_of_windows"])) or "0" for r in rows]),
        "",
        "Once for a list of classes: "
        + ", ".join(f"{name} {s:.2f} s" for name, s in results["preparation"].items())
        + '. "opencut_crf" is a first run.',
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
