"""Encoders at full size with random weights: loaded, run and compared with their own libraries.

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
    lines = [
        "# Encoders at full size",
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
    (RESULTS / "models.md").write_text("\n".join(lines) + "\n")


def main(models):
    path = RESULTS / "models.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    for model in models or MODELS:
        answer = subprocess.run(
            [sys.executable, __file__, "--one", model], capture_output=True, text=True
        )
        if answer.returncode:
            raise SystemExit(f"{model}: {answer.stderr[-2000:]}")
        found = json.loads(answer.stdout.splitlines()[-1])
        print(found)
        rows = [row for row in rows if row["model"] != model] + [found]
        write(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(sys.argv[1:])
