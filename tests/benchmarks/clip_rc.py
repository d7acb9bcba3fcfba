r"""CLIP-RC in small: its settings and parts on held-out scenes, with paired bootstrap intervals.

    python tests/benchmarks/clip_rc.py --runs runs/clip_rc \
        --collection runs/miniature_retclip/collection

Trains what is missing with `configs/miniature_clip_rc.yaml` (a stopped training is resumed),
evaluates on test scenes, and writes `results/clip_rc.{json,md}`. `--only` names some trainings.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch

from ovref.config import load
from ovref.evaluation.compare import compare, open_run
from ovref.evaluation.evaluate import evaluate
from ovref.evaluation.report import markdown_table
from ovref.evaluation.spec import EvaluateSpec
from ovref.training.train_clip_rc import ClipRcTraining, run
from ovref_inference.segmenters import ClipRcConfig
from ovref_inference.segmenters.clip_rc_config import ClipRcNetworkConfig
from ovref_inference.segmenters.clip_rc_network import ClipRcNetwork
from ovref_pipelines.verbs.train import TrainConfig

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
CONFIG = ROOT / "configs/miniature_clip_rc.yaml"
WITHOUT = {"regions": 0, "align": (), "recovery_layers": 0}
TRAININGS: dict[str, dict[str, Any]] = {
    "full": {},
    "base": {"network": WITHOUT},
    "transductive": {"setting": "transductive"},
    "supervised": {"setting": "supervised"},
}
"""What each training changes."""
ROWS = {
    "full": ("CLIP-RC, inductive", "full", {}),
    "base": ("without bridge, alignment and recovery", "base", {}),
    "transductive": ("CLIP-RC, transductive", "transductive", {"seen_penalty": 0.0}),
    "supervised": ("CLIP-RC, supervised", "supervised", {"seen_penalty": 0.0}),
    "no_penalty": ("inductive, seen scores not lowered", "full", {"seen_penalty": 0.0}),
    "prototypes": ("inductive, prototypes for names", "full", {"classes": "prototypes"}),
}
"""Rows of the table: title, training, settings of the segmenter."""
PAIRS = (
    ("full", "base"),
    ("transductive", "full"),
    ("supervised", "transductive"),
    ("full", "no_penalty"),
    ("prototypes", "full"),
    ("full", "text_only"),
)

RELEASED = """\
## Beside the released code

The released encoder, head and losses (uyzhang/CLIP-RC, which has no licence and is no part of this
repository) were run beside ours on the same random weights: a ViT of width 64 with 3 layers, images
of 128 x 128 in 64 patches, 16 regions, 5 prompts, 6 classes, a decoder of 3 layers, no dropout.
Largest differences: embeddings 2e-7, logits 8e-7 (of up to 1.0), recovered features 2e-7; losses of
one image, with `unlabelled=negative`, 1e-7 of their value. The released encoder adds the class
embedding to the class token twice, which the paper does not say and ours does not do; for the
comparison, ours was given that token.
"""
"""What was measured once, outside of this repository."""


def training_of(name: str, runs: Path) -> ClipRcTraining:
    """The configuration of a training; a transductive one takes half the steps, as the paper's."""
    spec = load(TrainConfig, CONFIG, [f"output={runs / name}"]).spec
    changes = dict(TRAININGS[name])
    if "network" in changes:
        changes["network"] = replace(spec.network, **changes["network"])
    if name == "transductive":
        changes["start"] = str(runs / "full")
        changes["training"] = replace(spec.training, steps=spec.training.steps // 2)
    return replace(spec, **changes)


def evaluation_of(name: str, runs: Path, collection: str, scenes: int) -> EvaluateSpec:
    """The evaluation of a row, on the split of the trainings."""
    common: dict[str, Any] = {
        "output": str(runs / "evaluated" / name),
        "scenes": scenes,
        "unseen": training_of("full", runs).data.unseen,
        "pictures": 0,
    }
    if name == "text_only":
        grids: dict[str, Any] = {"ablate_n": (), "ablate_k": (), "ablate_gamma": ()}
        return EvaluateSpec(collection=collection, rows=("text_only",), **grids, **common)
    _, training, settings = ROWS[name]
    config = ClipRcConfig(weights=str(runs / training), windows=None, **settings)
    used = collection if config.classes == "prototypes" else ""
    return EvaluateSpec(method="clip_rc", clip_rc=config, collection=used, **common)


def measure(runs: Path, collection: str, scenes: int) -> dict[str, Any]:
    """Evaluates every row whose training is finished, and compares them in pairs."""
    found: dict[str, Any] = {"scenes": scenes, "rows": {}, "differences": {}, "trainings": {}}
    for name in TRAININGS:
        path = runs / name / "clip_rc.json"
        if path.is_file():
            recorded = json.loads(path.read_text())["training"]
            found["trainings"][name] = {k: recorded[k] for k in ("steps", "seconds", "data")}
    names = [name for name, (_, training, _) in ROWS.items() if training in found["trainings"]]
    if not collection:
        names.remove("prototypes")
    for name in [*names, *(["text_only"] if collection else [])]:
        spec = evaluation_of(name, runs, collection, scenes)
        result = evaluate(spec, lambda line: None, device="cpu")
        found["rows"][name] = result["rows"][0]
        print(name, found["rows"][name], flush=True)
    for one, other in PAIRS:
        if {one, other} <= found["rows"].keys():
            places = [str(runs / "evaluated" / name) for name in (one, other)]
            compared = compare(*map(open_run, places), runs / "compared" / f"{one}_{other}", 0)
            found["differences"][f"{one} - {other}"] = compared["differences"]
    return found


def speed(repeats: int = 6) -> dict[str, float]:
    """CPU seconds of one 512 x 512 image through a ViT-B/16 of random weights, alone, with prompts
    and bridge, and through the whole network with 20 and 171 classes: the least of some runs by
    turns, since on a busy machine the same work takes up to twice as long."""
    visual = open_clip.transformer.VisionTransformer(
        image_size=512, patch_size=16, width=768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512
    )
    network = ClipRcNetwork(visual, ClipRcNetworkConfig()).eval()
    pixels = torch.randn(1, 3, 512, 512)
    calls = {
        "frozen ViT": lambda: visual(pixels),
        "with prompts and bridge": lambda: network.encoder(pixels),
        "20 classes": lambda: network(pixels, torch.randn(20, 512)),
        "171 classes": lambda: network(pixels, torch.randn(171, 512)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(repeats):
            for name, call in calls.items():
                began = time.process_time()
                call()
                times[name].append(time.process_time() - began)
    return {name: round(min(each), 3) for name, each in times.items()}


def page(found: dict[str, Any]) -> str:
    """The Markdown page."""

    def percent(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{100 * value:{sign}.1f}"

    keys = ("hiou", "seen", "unseen", "miou", "pixel_accuracy")
    titles = {name: title for name, (title, _, _) in ROWS.items()} | {"text_only": "text only"}
    rows = [[titles[n], *(percent(row[k]) for k in keys)] for n, row in found["rows"].items()]
    differences = []
    for pair, each in found["differences"].items():
        words = pair.split(" - ")
        cells = [
            f"{percent(each[k]['value'], '+')} ({percent(each[k]['low'], '+')} to "
            f"{percent(each[k]['high'], '+')})"
            for k in ("hiou", "seen", "unseen")
        ]
        differences.append([f"{titles[words[0]]} less {titles[words[1]]}", *cells])
    trained = ", ".join(
        f"{name} {one['steps']} steps in {one['seconds']:.0f} s"
        for name, one in found["trainings"].items()
    )
    speeds = ", ".join(f"{name} {seconds:.2f}" for name, seconds in (found["speed"] or {}).items())
    return "\n".join([
        "# CLIP-RC in small",
        "",
        "Trained and measured on the miniature: these numbers say nothing about the real models.",
        f"{found['scenes']} test scenes, 27 classes, six things unseen in training (boat, car,",
        "mushroom, balloon, cup, butterfly); a frozen `miniature:clip`, one seed.",
        "",
        *markdown_table(["%", "hIoU", "seen mIoU", "unseen mIoU", "mIoU", "pixel accuracy"], rows),
        "",
        "Differences with 95 % intervals of a paired bootstrap over the scenes:",
        "",
        *markdown_table(["percentage points", "hIoU", "seen", "unseen"], differences),
        "",
        f"Trainings: {trained}; wall time of one thread on a",
        "shared machine.",
        "",
        "At full size, CPU seconds of one 512 x 512 image through a ViT-B/16 of random weights,",
        f"one thread: {speeds or 'not measured yet (`--speed`)'}.",
        "",
        RELEASED,
        "    python tests/benchmarks/clip_rc.py --runs runs/clip_rc \\",
        "        --collection runs/miniature_retclip/collection",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--collection", default="", help="of CLIP's features, for prototypes")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--only", default="", help="trainings, with commas; none trains nothing")
    parser.add_argument("--speed", action="store_true", help="measure it anew, on a quiet machine")
    arguments = parser.parse_args()
    runs = arguments.runs.absolute()
    for name in TRAININGS if not arguments.only else arguments.only.split(","):
        if name != "none":
            run(training_of(name, runs), lambda line: print(line, flush=True))
    found = measure(runs, arguments.collection, arguments.scenes)
    known = RESULTS / "clip_rc.json"
    recorded = json.loads(known.read_text()).get("speed") if known.is_file() else None
    found["speed"] = speed() if arguments.speed else recorded
    (RESULTS / "clip_rc.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "clip_rc.md").write_text(page(found))


if __name__ == "__main__":
    main()
