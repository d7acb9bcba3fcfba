"""Stable Diffusion 1.5 in full size beside castorini/daam as released, on the CPU.

The architecture has random weights, written to a folder that both load: values do not matter for
speed, and heatmaps of the same weights and seed can be compared all the same. One image is
generated at 512 x 512 with guidance, up to the latent: decoding is the same for all. Each
environment runs with and without attribution in turn, in a process of its own.

    python tests/benchmarks/daam_full_size.py PYTHON_WITH_DAAM [--steps 1] [--turns 2] [--threads 2]

Needs about 12 GB of memory and 5 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench import presets
from daam_side_by_side import minmax, rename_for_old_transformers
from memory import peak_bytes, reset_peak
from ovref.models.attribution import noun_weights
from ovref.models.loading import load_pipeline
from ovref.models.recorders.unet import recording
from ovref.models.tokens import token_positions

CAPTION = "a red bus beside a small dog under an apple tree"
WORDS = ["bus", "dog", "tree"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="of the environment with daam")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2, help="of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--generate", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        generate(*arguments.generate)
        return
    orders = {
        "threads": arguments.threads,
        "warm": False,  # the first turn is left out instead
        "steps": arguments.steps,
        "guidance": 7.5,
        "output_type": "latent",
        "captions": [CAPTION],
        "words": [WORDS],
        "seeds": [0],
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        weights, given = Path(folder) / "weights", Path(folder) / "orders.json"
        torch.manual_seed(0)
        pipeline = presets.pipeline("sd15", "ddim", torch.float32, torch.device("cpu"))
        pipeline.save_pretrained(weights)
        del pipeline
        write_old_tokenizer(weights / "tokenizer")
        here = Path(__file__).parent
        runs = {
            "ovref": [sys.executable, Path(__file__), arguments.python, "--generate"],
            "daam": [arguments.python, here / "daam_released.py"],
        }
        for name, command in runs.items():
            if name == "daam":
                rename_for_old_transformers(weights / "text_encoder" / "model.safetensors")
            turns = ["bare", *["bare", name, name, "bare"] * ((arguments.turns + 1) // 2)]
            given.write_text(json.dumps(orders | {"weights": str(weights), "turns": turns}))
            subprocess.run([*command, given, Path(folder) / f"{name}.npz"], check=True)
            found[name] = dict(np.load(Path(folder) / f"{name}.npz"))
            print(name, {k: v.tolist() for k, v in found[name].items() if v.ndim < 2}, flush=True)
    results = compare(found["ovref"], found["daam"], orders)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "daam_full_size.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "daam_full_size.md").write_text(report(results))
    print(report(results))


def write_old_tokenizer(folder):
    """The two files from which transformers 4 reads CLIP's tokenizer."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    text = "#version: 0.2\n" + "\n".join(merges) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")


def generate(given, output):
    """Draws with ovref, in the order asked for; what daam_released.py does with daam."""
    orders = json.loads(given.read_text())
    torch.set_num_threads(orders["threads"])
    pipeline = load_pipeline(
        orders["weights"], revision=None, scheduler="ddim", dtype="float32", device="cpu"
    )
    spans = [[(CAPTION.index(word), CAPTION.index(word) + len(word))] for word in WORDS]
    weights_bkn = noun_weights([token_positions(pipeline.tokenizer, CAPTION, spans)], 77)

    def bare():
        return pipeline(
            CAPTION, num_inference_steps=orders["steps"], guidance_scale=orders["guidance"],
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    def attributed():
        with recording(pipeline.unet, weights_bkn, (64, 64)) as attribution:
            images = bare()
        return images, attribution.heatmaps_bnhw()

    found = {f"{k}_{what}": [] for k in ("bare", "ovref") for what in ("cpu", "wall", "peak")}
    for kind in orders["turns"]:
        reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        generated = bare() if kind == "bare" else attributed()
        found[f"{kind}_cpu"].append(time.process_time() - cpu)
        found[f"{kind}_wall"].append(time.perf_counter() - wall)
        found[f"{kind}_peak"].append(peak_bytes())
        if kind == "ovref":
            images, maps = generated
    np.savez(output, images=images.numpy(), maps=maps[0].numpy(), **found)


def compare(ours, theirs, orders):
    found = {
        "bare, in daam's environment": (theirs, "bare"),
        "daam": (theirs, "daam"),
        "bare": (ours, "bare"),
        "ovref": (ours, "ovref"),
    }
    # The first bare turn warms up.
    seconds = {
        clock: {
            name: float(np.mean(times[f"{kind}_{clock}"][int(kind == "bare") :])) / orders["steps"]
            for name, (times, kind) in found.items()
        }
        for clock in ("cpu", "wall")
    }
    pairs = {"ovref": "bare", "daam": "bare, in daam's environment"}
    gaps = [
        np.abs(minmax(a) - minmax(b)) for a, b in zip(ours["maps"], theirs["maps"], strict=True)
    ]
    masks = [
        (minmax(a) > 0.45, minmax(b) > 0.45)
        for a, b in zip(ours["maps"], theirs["maps"], strict=True)
    ]
    return {
        "what": "Stable Diffusion 1.5 in full size beside castorini/daam 0.2.0",
        "model": "random weights; the time of a step does not depend on them",
        "threads": orders["threads"],
        "steps": orders["steps"],
        "guidance": orders["guidance"],
        "torch": torch.__version__,
        "clock": "text encoding is in the times, decoding is not",
        "cpu_seconds_a_step": seconds["cpu"],
        "wall_seconds_a_step": seconds["wall"],
        "every_turn": {
            clock: {
                name: times[f"{kind}_{clock}"].tolist() for name, (times, kind) in found.items()
            }
            for clock in ("cpu", "wall", "peak")
        },
        "attribution_percent": {
            clock: {name: 100 * (s[name] / s[bare] - 1) for name, bare in pairs.items()}
            for clock, s in seconds.items()
        },
        "times_faster_than_daam": seconds["cpu"]["daam"] / seconds["cpu"]["ovref"],
        # Later bare turns keep what attribution has freed.
        "peak_mb_of_the_process": {
            "bare, in daam's environment": theirs["bare_peak"][0] / 1e6,
            "daam": theirs["daam_peak"].max() / 1e6,
            "bare": ours["bare_peak"][0] / 1e6,
            "ovref": ours["ovref_peak"].max() / 1e6,
        },
        "daam_stores_bytes_an_image": int(theirs["stored"]),
        "largest_difference_of_latents": float(np.abs(ours["images"] - theirs["images"]).max()),
        "largest_latent": float(np.abs(ours["images"]).max()),
        "mean_difference_after_minmax": float(np.mean([gap.mean() for gap in gaps])),
        "largest_difference_after_minmax": float(max(gap.max() for gap in gaps)),
        "mask_iou_at_0.45": float(np.mean([(a & b).sum() / (a | b).sum() for a, b in masks])),
    }


def report(results):
    rows, percent = results["cpu_seconds_a_step"], results["attribution_percent"]
    overhead = {
        name: f"{percent['cpu'][name]:+.1f}% ({percent['wall'][name]:+.1f}%)"
        for name in ("daam", "ovref")
    }
    lines = [
        "# Full size beside castorini/daam",
        "",
        f"{results['what']}, {results['model']}. One caption at 512 x 512, guidance "
        f"{results['guidance']}, {results['steps']} DDIM steps, float32 on {results['threads']} "
        f"CPU threads, torch {results['torch']}; {results['clock']}. Made by "
        "`tests/benchmarks/daam_full_size.py`.",
        "",
        "| | CPU seconds a step | by the wall | attribution | peak MB of the process |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {seconds:.2f} | {results['wall_seconds_a_step'][name]:.2f} | "
            f"{overhead.get(name, '')} | "
            f"{results['peak_mb_of_the_process'][name]:.0f} |"
            for name, seconds in rows.items()
        ),
        "",
        "| | |",
        "|---|---:|",
    ]
    for name, value in results.items():
        if isinstance(value, float | int) and name not in ("threads", "steps", "guidance"):
            shown = f"{value:.3g}" if isinstance(value, float) else value
            lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
