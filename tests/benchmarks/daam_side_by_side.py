"""castorini/daam as released beside ovref, on the same weights, captions and seeds.

daam 0.2.0 pins diffusers 0.21.2 and transformers 4.30.2, so it runs in an environment of its own,
whose Python is given. It generates one caption at a time; ovref a batch. Each is timed in CPU
time of its own process, without loading, alternating with plain generation; every run generates all
captions, and the median of the runs counts. Its heatmaps are compared with ours,
enlarged to its size.

    python tests/benchmarks/daam_side_by_side.py PYTHON_WITH_DAAM [--captions 16] [--steps 10]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from memory import peak_bytes, reset_peak
from ovref.miniature.scenes import render
from ovref.models.diffusion import Generator
from ovref.models.loading import load_pipeline
from ovref.stages.synthesize import Synthesize
from ovref_inference.models import resolve

MODEL = "miniature:stable_diffusion"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="of the environment with daam")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--turns", type=int, default=5, help="of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scenes = [render(seed, "validation") for seed in range(arguments.captions)]
    orders = {
        "threads": 1,
        "warm": True,
        "turns": ["bare", "daam"] * arguments.turns,
        "output_type": "np",
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "captions": [scene.caption for scene in scenes],
        "words": [[s.caption[n.start : n.end] for n in s.nouns] for s in scenes],
        "seeds": list(range(arguments.captions)),
    }
    ours = generate(orders, arguments)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "orders.json", Path(folder) / "daam.npz"
        weights = Path(folder) / "weights"
        shutil.copytree(resolve(MODEL), weights)
        rename_for_old_transformers(weights / "text_encoder" / "model.safetensors")
        given.write_text(json.dumps(orders | {"weights": str(weights)}))
        script = Path(__file__).parent / "daam_released.py"
        subprocess.run([arguments.python, "-W", "ignore", script, given, found], check=True)
        theirs = dict(np.load(found))
    results = compare(ours, theirs, orders, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "daam.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "daam.md").write_text(report(results))
    print(report(results))


def rename_for_old_transformers(path):
    """Names of a CLIPTextModel's tensors as they were before transformers 5."""
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def generate(orders, arguments):
    pipeline = load_pipeline(MODEL, revision=None, scheduler="ddim", dtype="float32", device="cpu")
    generator = Generator(
        pipeline,
        Synthesize(
            model="given", steps=orders["steps"], guidance=orders["guidance"], size_hw=(64, 64)
        ),
    )
    spans = [
        [[(m, m + len(w)) for m in places(caption, w)] for w in words]
        for caption, words in zip(orders["captions"], orders["words"], strict=True)
    ]
    positions = [
        generator.positions(caption, found)
        for caption, found in zip(orders["captions"], spans, strict=True)
    ]
    captions, seeds = orders["captions"], orders["seeds"]

    def all_of(size, run):
        reset_peak()
        started = time.process_time()
        found = []
        for start in range(0, len(captions), size):
            found += run(slice(start, start + size))
        return found, time.process_time() - started, peak_bytes()

    def attributed(part):
        return generator.generate(captions[part], positions[part], seeds[part])

    def bare(part):
        return list(
            pipeline(
                captions[part], num_inference_steps=orders["steps"], output_type="np",
                guidance_scale=orders["guidance"],
                generator=[torch.Generator().manual_seed(s) for s in seeds[part]],
            ).images
        )  # fmt: skip

    kinds = {
        "bare": (arguments.batch, bare),
        "attributed": (arguments.batch, attributed),
        "one_at_a_time": (1, attributed),
    }
    attributed(slice(0, 1))
    turns = {kind: [] for kind in kinds}
    for _ in range(arguments.turns):
        for kind, (size, run) in kinds.items():
            turns[kind].append(all_of(size, run))
    return {
        "drawings": turns["attributed"][0][0],
        "seconds": {kind: statistics.median(t[1] for t in found) for kind, found in turns.items()},
        "peak_bytes": {
            # Later bare turns keep what attribution has freed.
            "bare": turns["bare"][0][2],
            "attributed": max(t[2] for t in turns["attributed"]),
        },
    }


def places(caption, word):
    """Starts of the word, as a whole word: daam averages all occurrences of its tokens."""
    padded = f" {caption} "
    return [i for i in range(len(caption)) if padded.startswith(f" {word} ", i)] or [
        caption.index(word)
    ]


def compare(ours, theirs, orders, arguments):
    side = theirs["maps"].shape[-1]
    mine = np.concatenate([
        functional.interpolate(
            torch.from_numpy(d.heatmaps_nhw)[None], (side, side), mode="bicubic"
        )[0].numpy()
        for d in ours["drawings"]
    ])  # fmt: skip
    gaps = [np.abs(minmax(a) - minmax(b)) for a, b in zip(mine, theirs["maps"], strict=True)]
    masks = [
        (minmax(a) > 0.45, minmax(b) > 0.45) for a, b in zip(mine, theirs["maps"], strict=True)
    ]
    images = np.stack([d.image_hwc for d in ours["drawings"]]) / 255 - theirs["images"]
    count = len(orders["captions"])
    daam = float(np.median(theirs["daam_cpu"]))
    return {
        "what": "castorini/daam 0.2.0 beside ovref",
        "model": f"{MODEL} (the miniature: no figure here is one of a real model)",
        "clock": "CPU time of each process, one thread",
        "turns": arguments.turns,
        "steps": orders["steps"],
        "guidance": orders["guidance"],
        "captions": count,
        "batch": arguments.batch,
        "images_per_cpu_second": {
            "daam": count / daam,
            "bare, in daam's environment, one at a time": count / np.median(theirs["bare_cpu"]),
            "ovref, one at a time": count / ours["seconds"]["one_at_a_time"],
            "ovref": count / ours["seconds"]["attributed"],
            "bare, batched": count / ours["seconds"]["bare"],
        },
        "times_faster_than_daam": daam / ours["seconds"]["attributed"],
        "times_faster_than_daam_one_at_a_time": daam / ours["seconds"]["one_at_a_time"],
        "daam_stores_bytes_an_image": int(theirs["stored"]),
        "peak_mb_of_the_process": {
            "bare, in daam's environment": theirs["bare_peak"][0] / 1e6,
            "daam": theirs["daam_peak"].max() / 1e6,
            "bare, batched": ours["peak_bytes"]["bare"] / 1e6,
            "ovref": ours["peak_bytes"]["attributed"] / 1e6,
        },
        "mean_difference_of_images": float(np.abs(images).mean()),
        "heatmaps": len(gaps),
        "mean_difference_after_minmax": float(np.mean([gap.mean() for gap in gaps])),
        "largest_difference_after_minmax": float(max(gap.max() for gap in gaps)),
        "mask_iou_at_0.45": float(np.mean([(a & b).sum() / (a | b).sum() for a, b in masks])),
    }


def minmax(map_hw):
    return (map_hw - map_hw.min()) / max(map_hw.max() - map_hw.min(), 1e-12)


def report(results):
    lines = [
        "# Beside castorini/daam",
        "",
        f"{results['what']}. Model: {results['model']}. {results['captions']} captions, "
        f"{results['steps']} DDIM steps, guidance {results['guidance']}; {results['turns']} turns "
        "of each kind; daam takes one caption at a time, ovref batches of "
        f"{results['batch']}; {results['clock']}. Made by "
        "`tests/benchmarks/daam_side_by_side.py`.",
        "",
        "| | images per CPU second |",
        "|---|---:|",
        *(f"| {name} | {rate:.3f} |" for name, rate in results["images_per_cpu_second"].items()),
        "",
        "| | |",
        "|---|---:|",
    ]
    for name, value in results.items():
        if isinstance(value, float | int) and name not in ("steps", "guidance", "turns"):
            shown = f"{value:.3g}" if isinstance(value, float) else value
            lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    for name, value in results["peak_mb_of_the_process"].items():
        lines.append(f"| peak MB, {name} | {value:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
