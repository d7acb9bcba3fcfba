"""Forward passes of DINOv2-L, CLIP-L, GroundingDINO-base and SAM-B at full size, random weights.

Images a second in batches, and the share of the measured ceiling of matrix products.

    python tests/benchmarks/gpu_backbones.py --output OUT [--dtype bfloat16] [--batch 16]
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from bench import measure, presets
from bench.limits import BenchSpec, ceiling
from ovref.models.loading import DTYPES


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(presets.backbones()))
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    top = ceiling(dtype, device)
    results = {
        "what": f"forward passes in {arguments.dtype}",
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "ceiling": top,
        "backbones": {},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    spec = BenchSpec(batch_sizes=(arguments.batch,), repeats=arguments.repeats)
    for name in arguments.only:
        try:
            found = measure._backbone(name, dtype, device, spec, top)
        except RuntimeError as error:  # the others are measured all the same
            found = {"error": str(error)}
        results["backbones"][name] = found
        print(f"{name}: {found}", flush=True)
        path = arguments.output / "backbones.json"
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
