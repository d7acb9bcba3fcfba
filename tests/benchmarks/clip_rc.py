r"""CLIP-RC in small: the tables of its paper on held-out scenes, with paired bootstrap intervals.

    python tests/benchmarks/clip_rc.py --runs runs/clip_rc \
        --collection runs/miniature_retclip/collection

Trains what is missing with `configs/miniature_clip_rc.yaml` (a stopped training is resumed),
chooses for each head on validation scenes how far scores of seen classes are lowered, evaluates it
on test scenes, and writes `results/clip_rc.{json,md}` after each training. What is measured is kept
in `found.json` below `--runs`. `--only` names some trainings, `--speed` times the full size.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from clip_rc_page import PAIRS, page
from machine import commit, processor
from ovref.config import load
from ovref.evaluation.compare import bootstrap_times, interval, metrics_of, open_run
from ovref.evaluation.datasets import open_scenes
from ovref.evaluation.evaluate import evaluate
from ovref.evaluation.metrics_semantic import confusion
from ovref.evaluation.spec import EvaluateSpec
from ovref.evaluation.totals import Overlaps, overlaps_of, scored_images
from ovref.miniature.shapes import CLASSES
from ovref.storage.file_store import Store
from ovref.training import checkpoints, train_clip_rc
from ovref.training.train_clip_rc import ClipRcTraining
from ovref_inference import load_segmenter
from ovref_inference.models import copy_weights
from ovref_inference.pixels import Pixels
from ovref_inference.segmenters import ClipRcConfig
from ovref_inference.segmenters.clip_rc import ClipRcHead, ClipRcSegmenter
from ovref_inference.segmenters.clip_rc_config import ClipRcNetworkConfig
from ovref_inference.segmenters.clip_rc_network import ClipRcNetwork

RESULTS = Path(__file__).parent / "results"
CONFIG = Path(__file__).parents[2] / "configs/miniature_clip_rc.yaml"
UNSEEN = load(ClipRcTraining, CONFIG).data.unseen
SEEN = tuple(name not in UNSEEN for name in CLASSES)
PLAIN = ("network.regions=0", "network.align=[]", "network.recovery_layers=0")
SEEDS = (0, 1)
SETTINGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "base": PLAIN,
    "transductive": ("setting=transductive",),
    "supervised": ("setting=supervised",),
}
"""Trainings of tables 1 to 4, each with SEEDS: what they change in the configuration."""
SHORT = ("training.steps=200",)
"""What all trainings of tables 5 to 8 change besides; one seed."""
SMALL: dict[str, tuple[str, ...]] = {
    "table": (),
    "plain": PLAIN,
    "bridge": ("network.align=[]", "network.recovery_layers=0"),
    "aligned": ("network.recovery_layers=0",),
    "updated": ("network.update_regions=true",),
    "tokens1": ("network.regions=1",),
    "tokens16": ("network.regions=16",),
    "tokens64": ("network.regions=64",),
    "patches": ("network.align=[]",),
    "global": ("network.align=[global]",),
    "regions": ("network.align=[regions]",),
    "l2": ("losses.recovery_kind=l2",),
    "recovery2": ("network.recovery_layers=2",),
    "recovery3": ("network.recovery_layers=3",),
}
"""Trainings of tables 5 to 8."""
SLOW = ("training.rate=0.001", "training.warm_up=100")
SEARCH: dict[str, tuple[str, ...]] = {
    "rate2": ("training.rate=0.002",),
    "rate1": SLOW,
    "unclipped": (*SLOW, "training.clip_norm=null", "training.steps=800"),
    "unclipped_transductive": (
        *SLOW, "training.clip_norm=null", "setting=transductive", "start={runs}/unclipped",
    ),
}  # fmt: skip
"""Other settings, compared on validation scenes."""
MORE = [f"{name}_{seed}_more" for seed in SEEDS for name in ("base", "full")]
"""Trainings that go on where `base_0` and so on end, with as many steps and other images."""
TRAININGS = [*(f"{name}_{seed}" for seed in SEEDS for name in SETTINGS), *SMALL, *MORE]
PENALTIES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""How far scores of seen classes may be lowered."""
VALIDATION = 300
"""Validation scenes."""


def training_of(name: str, runs: Path) -> ClipRcTraining:
    """The configuration of a training; a transductive one takes half the steps, as the paper's."""
    if name in SMALL:
        changes = [*SMALL[name], *SHORT]
    elif name in SEARCH:
        changes = [change.format(runs=runs) for change in SEARCH[name]]
    else:
        kind, seed, *more = name.split("_")
        changes = [*SETTINGS[kind], f"training.seed={10 + int(seed) if more else seed}"]
        if kind == "transductive":
            steps = load(ClipRcTraining, CONFIG).training.steps
            changes += [f"start={runs / f'full_{seed}'}", f"training.steps={steps // 2}"]
    return load(ClipRcTraining, CONFIG, [*changes, f"output={runs / name}"])


def train(name: str, runs: Path) -> None:
    """Trains what is missing of a training."""
    network_of = train_clip_rc.load_network

    def trained_network(*given: Any) -> Any:
        network, pixels = network_of(*given)
        store = Store.open(str(runs / name.removesuffix("_more")))
        found = checkpoints.read(store, checkpoints.steps_saved(store)[-1])
        copy_weights(network.trained_state(), found.weights, store.url)
        return network, pixels

    start = trained_network if name in MORE else network_of
    with patch.object(train_clip_rc, "load_network", start):
        train_clip_rc.run(training_of(name, runs), lambda line: print(line, flush=True))


def scenes_of(kind: str, runs: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W, 3) and labels (n, H, W) of `validation`, `test` or `print`: test scenes in
    another style of rendering. Drawn once below `runs`."""
    path = runs / f"{kind}_{count}.npz"
    if not path.is_file():
        split = "test" if kind == "print" else kind
        examples = list(open_scenes(split, count))
        images = [one.image_hwc for one in examples]
        if kind == "print":
            images = [printed(image_hwc, seed) for seed, image_hwc in enumerate(images)]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=images, labels=[one.label_hw for one in examples])
    with np.load(path) as stored:
        return stored["images"], stored["labels"]


def printed(image_hwc: np.ndarray, seed: int) -> np.ndarray:
    """A scene as a print: colours faded by a third, ten tones, darker edges, paper grain."""
    image = Image.fromarray(image_hwc)
    grey = image.convert("L")
    faded_hwc = (2 * np.asarray(image, np.float32) + np.asarray(grey, np.float32)[..., None]) / 3
    tones_hwc = np.round(faded_hwc / 28) * 28
    edges_hw = np.asarray(grey.filter(ImageFilter.FIND_EDGES)) > 60
    tones_hwc[edges_hw] *= 0.8
    grain_hw = np.random.default_rng(seed).normal(0, 3, edges_hw.shape)
    return np.clip(tones_hwc + grain_hw[..., None], 0, 255).astype(np.uint8)


@torch.inference_mode()
def count(
    segmenter: ClipRcSegmenter, images: np.ndarray, labels: np.ndarray, penalties: Sequence[float]
) -> list[Overlaps]:
    """What a head finds in whole images, for each penalty of seen classes: as `ovref evaluate`
    counts, many images at a time."""
    classes = torch.from_numpy(segmenter.prepare(CLASSES)[0])
    parts = [torch.tensor([i for i, s in enumerate(SEEN) if s == seen]) for seen in (True, False)]
    tables = np.zeros((len(penalties), len(images), len(CLASSES), len(CLASSES) + 1), np.int32)
    for first in range(0, len(images), 25):
        chosen = slice(first, first + 25)
        pixels = segmenter._pixels(list(images[chosen]), segmenter.head.network.size_hw)
        logits = segmenter._network(pixels, classes).logits_nchw
        scores = interpolate(logits, size=labels.shape[1:], mode="bilinear").sigmoid()
        (seen, best_seen), (unseen, best_unseen) = (scores[:, part].max(1) for part in parts)
        for table, penalty in zip(tables, penalties, strict=True):
            found = torch.where(seen - penalty >= unseen, *(
                part[best] for part, best in zip(parts, (best_seen, best_unseen), strict=True)
            ))  # fmt: skip
            for place, found_hw in enumerate(found.numpy(), start=first):
                table[place] = confusion(labels[place], found_hw, len(CLASSES))
    right, true = tables[..., :-1].diagonal(axis1=2, axis2=3), tables.sum(3)
    either = true + tables[..., :-1].sum(2) - right
    return [
        Overlaps(right=r, either=e, true=t) for r, e, t in zip(right, either, true, strict=True)
    ]


def scores_of(overlaps: Overlaps) -> dict[str, float]:
    """Metrics of a row."""
    once = np.ones((1, len(overlaps.right)))
    known = {name: float(metric(overlaps, once)[0]) for name, metric in metrics_of(SEEN).items()}
    right, true = overlaps.right.sum(0), overlaps.true.sum(0)
    known["mean_accuracy"] = float((right[true > 0] / true[true > 0]).mean())
    return {name: round(value, 4) for name, value in known.items()}


def best_of(swept: dict[str, dict[str, float]]) -> float:
    """The penalty of the highest hIoU, the smaller one of equals."""
    return float(max(swept, key=lambda penalty: swept[penalty]["hiou"]))


def sweep(training: str, runs: Path) -> dict[str, dict[str, float]]:
    """Scores on validation scenes by how far those of seen classes are lowered."""
    found = count(open_head(runs / training), *scenes_of("validation", runs, VALIDATION), PENALTIES)
    return {str(p): scores_of(one) for p, one in zip(PENALTIES, found, strict=True)}


def open_head(place: Path, collection: str = "") -> ClipRcSegmenter:
    """A head as a segmenter, by names or by the prototypes of a collection."""
    classes: Literal["text", "prototypes"] = "prototypes" if collection else "text"
    config = ClipRcConfig(weights=str(place), windows=None, classes=classes)
    return load_segmenter(collection or place, "clip_rc", config=config, device="cpu")


def text_only(runs: Path, collection: str, scenes: int) -> Overlaps:
    """Dense CLIP, by `ovref evaluate`."""
    spec = EvaluateSpec(
        collection=collection, output=str(runs / "text_only"), scenes=scenes, unseen=UNSEEN,
        rows=("text_only",), ablate_n=(), ablate_k=(), ablate_gamma=(), pictures=0,
    )  # fmt: skip
    evaluate(spec, lambda line: None, device="cpu")
    return overlaps_of(scored_images(open_run(spec.output).scores), [0], len(CLASSES))[0]


def measure(training: str, runs: Path, collection: str, scenes: int, found: dict[str, Any]) -> None:
    """Evaluates the missing rows of a finished training, and compares what can be compared."""
    place = runs / training
    recorded = json.loads((place / "clip_rc.json").read_text())["training"]
    found["trainings"][training] = {k: recorded[k] for k in ("steps", "seconds")}
    if training not in found["validation"]:
        found["validation"][training] = sweep(training, runs)
    chosen = best_of(found["validation"][training])
    rows: dict[str, Callable[[], Overlaps]] = {}

    def add(row: str, penalty: float, kind: str = "test", of: str = "") -> None:
        rows[row] = lambda: count(
            open_head(place, of), *scenes_of(kind, runs, scenes), (penalty,)
        )[0]  # fmt: skip

    add(training, chosen)
    if training.startswith(("full", "base")) and training not in MORE:
        add(f"{training} print", 0.0, "print")
    if training == "full_0":
        add("full_0 none", 0.0)
        add("full_0 paper", 0.1)
        if collection:
            add("full_0 prototypes", chosen, of=collection)
            rows["text_only"] = lambda: text_only(runs, collection, scenes)
    new = [row for row in rows if row not in found["rows"]]
    for row in new:
        overlaps = rows[row]()
        found["rows"][row] = scores_of(overlaps)
        np.savez(runs / f"row {row}.npz", **vars(overlaps))
        print(row, found["rows"][row], flush=True)
    metrics, times_sn = metrics_of(SEEN), bootstrap_times(scenes)
    for pair in PAIRS:
        if set(pair) <= found["rows"].keys() and " - ".join(pair) not in found["differences"]:
            a, b = (Overlaps(**np.load(runs / f"row {row}.npz")) for row in pair)
            found["differences"][" - ".join(pair)] = {
                name: interval(metric(a, times_sn), metric(b, times_sn))
                for name, metric in metrics.items()
            }


class RandomTexts:
    """Stands in for CLIP's text tower, which is no part of what is timed."""

    def encode(self, texts: list[str]) -> np.ndarray:
        vectors = np.random.default_rng(0).normal(size=(len(texts), 512)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def speed(repeats: int = 3) -> dict[str, dict[str, float]]:
    """CPU seconds of one thread and multiply-adds (1e9) of one 512 x 512 image through a ViT-B/16
    of random weights, alone, with prompts and bridge, through the network, and from photograph to
    label map: the least seconds of some runs by turns, since a busy machine takes up to twice as
    long. Some two minutes."""
    torch.set_num_threads(1)
    visual = open_clip.transformer.VisionTransformer(
        image_size=512, patch_size=16, width=768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512
    )
    config = ClipRcNetworkConfig()
    network = ClipRcNetwork(visual, config).eval().requires_grad_(False)
    scale = Pixels((0.5,), (0.5,), "bicubic", torch.device("cpu"), torch.float32)
    names = [f"class {number}" for number in range(171)]
    head = ClipRcHead(
        network=config, dim=512, seen=tuple(names), unseen=(), setting="", templates=("{}",),
        training={}, weights_sha256="",
    )  # fmt: skip
    segmenter = ClipRcSegmenter(head, network, scale, RandomTexts())
    image_hwc = np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8)
    pixels = scale([image_hwc], (512, 512))
    calls: dict[str, Callable[[], Any]] = {
        "frozen ViT": lambda: visual(pixels),
        "with prompts and bridge": lambda: network.encoder(pixels),
    }
    for count in (20, 171):
        classes = torch.from_numpy(segmenter.prepare(names[:count])[0])
        calls |= {
            f"network, {count} classes": partial(network, pixels, classes),
            f"segmenter, {count} classes": partial(segmenter.segment, [image_hwc], names[:count]),
        }
    found: dict[str, dict[str, float]] = {}
    torch.backends.mha.set_fastpath_enabled(False)  # whose fused operators are not counted
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            found[name] = {"gmacs": round(counter.get_total_flops() / 2e9, 1), "runs": repeats}
    torch.backends.mha.set_fastpath_enabled(True)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, call in calls.items():
                began = time.process_time()
                call()
                times[name].append(time.process_time() - began)
    for name, each in times.items():
        found[name]["seconds"] = round(min(each), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--collection", default="", help="of CLIP's features, for prototypes")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--only", default="", help="trainings, with commas; none trains nothing")
    parser.add_argument("--speed", action="store_true", help="measure it anew, on an idle machine")
    arguments = parser.parse_args()
    runs = arguments.runs.absolute()
    state = runs / "found.json"
    found: dict[str, Any] = {
        name: {} for name in ("trainings", "validation", "rows", "differences", "search", "speed")
    }
    if state.is_file():
        found |= json.loads(state.read_text())

    def keep() -> None:
        runs.mkdir(parents=True, exist_ok=True)
        if arguments.only != "none":
            found["scenes"] = arguments.scenes
            found["made"] = {
                "date": date.today().isoformat(), "commit": commit(), "processor": processor()
            }  # fmt: skip
        for path in (state, RESULTS / "clip_rc.json"):
            path.write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "clip_rc.md").write_text(page(found))

    names = [*TRAININGS, *SEARCH] if not arguments.only else arguments.only.split(",")
    for name in names if arguments.only != "none" else ():
        print(name, flush=True)
        train(name, runs)
        if name in SEARCH:
            settings = " ".join(SEARCH[name])
            found["search"][name] = {"settings": settings, "validation": sweep(name, runs)}
        else:
            measure(name, runs, arguments.collection, arguments.scenes, found)
        keep()
    if arguments.speed:
        found["speed"] = speed()
    keep()


if __name__ == "__main__":
    main()
