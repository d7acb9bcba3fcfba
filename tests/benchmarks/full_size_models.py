"""Encoders and generators at full size with random weights: run and compared.

    python tests/benchmarks/full_size_models.py [MODEL ...]

Writes tests/benchmarks/results/models.json and models.md; models named there before are kept. Each
model runs in a process of its own, so that its memory is its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from full_size_generators import GENERATORS
from full_size_generators import measure as measure_generator
from machine import commit, processor

RESULTS = Path(__file__).parent / "results"
MODELS = (
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "google/siglip2-large-patch16-256",
    "google/tipsv2-l14",
    "nvidia/C-RADIOv3-L",
)
SIZE_HW = (384, 512)
"""Height and width of the images: not square, and 768 patches of 16 pixels."""


def measure(model):
    """Makes, loads and runs one model; a dictionary of facts."""
    import numpy as np
    import torch

    from ovref.known_models import own_forward, random_weights, table
    from ovref_inference.encoders.config import VisualEncoderConfig
    from ovref_inference.encoders.load import load_visual_encoder

    known = table.find(model)
    with tempfile.TemporaryDirectory() as folder:
        random_weights.write(known, Path(folder))
        config = VisualEncoderConfig(model=folder, library=known.library, size_hw=SIZE_HW)
        torch.set_num_threads(1)
        started, cpu = time.monotonic(), time.process_time()
        encoder = load_visual_encoder(config, device="cpu", batch_size=1)
        load = time.monotonic() - started, time.process_time() - cpu
        size_hw = encoder.size_hw
        image = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
        cpu = time.process_time()
        found = encoder.encode([image])[0]
        run = time.process_time() - cpu
        resident = _resident_gb()
        own = own_forward.dense(config, image, encoder.patch_size)
    return {
        "model": model,
        "class": encoder.model_class,
        "parameters": encoder.parameters,
        "size_hw": list(size_hw),
        "grid_hw": list(encoder.grid_hw),
        "prefix_tokens": encoder.prefix_tokens,
        "dim": encoder.dim,
        "cpu_seconds_load": round(load[1], 2),
        "cpu_seconds_an_image": round(run, 2),
        "resident_gb": round(resident, 2),
        "largest_feature": float(np.abs(own).max()),
        "largest_difference": float(np.abs(own - found).max()),
    }


def _resident_gb():
    """The memory that this process has resident now, after the weights were made and freed."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e9


def write(rows):
    """models.json and models.md."""
    (RESULTS / "models.json").write_text(json.dumps(rows, indent=1) + "\n")
    generators = [row for row in rows if "generator" in row]
    rows = [row for row in rows if "generator" not in row]
    lines = [
        "# Models at full size",
        "",
        "## Encoders",
        "",
        "Random weights of the real architecture in the layout of its library, measured by",
        "`tests/benchmarks/full_size_models.py` on one core of a CPU in float32: a check that",
        "sizes, tokens and features are right, not of quality. The machine was busy, so times are",
        "CPU seconds of the process. Memory is what was resident after an image was encoded. The",
        "last column is the largest difference from the library's own forward pass, as a share of",
        "the largest feature.",
        "",
        "| model | class | million parameters | image | grid | left-out tokens | width | "
        "CPU s to load | CPU s an image | GB | difference |",
        "|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = row["largest_difference"] / row["largest_feature"]
        lines.append(
            f"| {row['model']} | {row['class']} | {row['parameters'] / 1e6:.0f} | "
            f"{row['size_hw'][0]} x {row['size_hw'][1]} | {row['grid_hw'][0]} x "
            f"{row['grid_hw'][1]} | {row['prefix_tokens']} | {row['dim']} | "
            f"{row['cpu_seconds_load']} | {row['cpu_seconds_an_image']} | {row['resident_gb']} | "
            f"{share:.1e} |"
        )
    lines += [
        "",
        "## Generators",
        "",
        "The same for whole pipelines: one caption with two nouns, from its text to an image and",
        "its heatmaps, by `tests/benchmarks/full_size_generators.py`, which says how; weights are",
        "made in memory, kept in bfloat16 and used in float32, block by block. The text encoder",
        "ran first and was freed; the peak of memory of Sana's image still has it. The image is",
        "compared with that of the bare pipeline, heatmaps with softmax attention written out in",
        "float64, by their range. Times are CPU seconds on one core of a busy machine, and no",
        "figures of a GPU.",
        "",
        "| model | text encoder, network | million parameters | image | grid | steps, guidance | "
        "read | CPU s text | CPU s image | GB text | GB image | image | heatmaps | commit |",
        "|---|---|---:|---|---|---|---|---:|---:|---:|---:|---|---:|---|",
    ]
    for row in generators:
        blocks = row["blocks"]
        lines.append(
            f"| {row['generator']} | {row['text_encoder']}, {row['network']} | "
            f"{row['text_parameters'] / 1e6:.0f}, {row['parameters'] / 1e6:.0f} | "
            f"{row['size_hw'][0]} x {row['size_hw'][1]} | {row['grid_hw'][0]} x "
            f"{row['grid_hw'][1]} | {row['steps']}, {row['guidance']} | `{row['reading']}` of "
            f"blocks {blocks[0]} to {blocks[-1]} | {row['cpu_seconds_text']} | "
            f"{row['cpu_seconds_generation']} | {row['peak_gb_text']} | "
            f"{row['peak_gb_generation']} | {'equal' if row['same_image'] else 'differs'} | "
            f"{row['largest_gap_of_range']:.1e} | {row['commit']} |"
        )
    (RESULTS / "models.md").write_text("\n".join(lines) + "\n")


def main(models):
    path = RESULTS / "models.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    for model in models or (*MODELS, *GENERATORS):
        answer = subprocess.run(
            [sys.executable, __file__, "--one", model], capture_output=True, text=True
        )
        if answer.returncode:
            raise SystemExit(f"{model}: {answer.stderr[-2000:]}")
        found = json.loads(answer.stdout.splitlines()[-1])
        print(found)
        found |= {"commit": commit(), "processor": processor()}
        rows = [row for row in rows if model not in row.values()] + [found]
        write(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        chosen = sys.argv[2]
        print(json.dumps((measure_generator if chosen in GENERATORS else measure)(chosen)))
    else:
        main(sys.argv[1:])
