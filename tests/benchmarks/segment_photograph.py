"""What one photograph costs at FOSSIL's own settings: CPU seconds by part, models of full size.

    OMP_NUM_THREADS=1 python tests/benchmarks/segment_photograph.py PHOTOGRAPH [--small]

The photograph is resized to a short side of 448 pixels and segmented over windows of 448, stride
224 (FOSSIL section 4.1), with 150 classes of 10 prototypes: DINOv2 ViT-L/14 at 518 pixels, OpenCut
on the keys of DINO ViT-B/8 at 480 pixels (3,600 patches), masks moved to the edges by the CRF. All
in float32 on the CPU. Weights and prototypes are random, so labels mean nothing; the keys are those
that the random backbone gives for the photograph, as they are. Class names are taken as encoded.

Seconds are CPU time of the process, all threads together, since wall clocks tell nothing on a busy
machine; public callables are wrapped as in `segment_windows.py`, and the windows go through the CRF
one after another. One run, which counts. Then OpenCut alone once more on the same keys with a CRF
at each cut (`crf_at: cuts`), as configs/papers has it. Writes results/segment_photograph.json and
.md.
"""

import argparse
import datetime
import json
import os
import resource
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from machine import commit, processor
from ovref_inference.proposers import load as proposers
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter
from segment_windows import (
    FULL,
    SMALL,
    Collection,
    by_size,
    class_names,
    dino_encoder,
    dinov2_encoder,
    seconds_by_part,
)

CLASSES = 150


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--small", action="store_true", help="tiny models: a rehearsal")
    arguments = parser.parse_args()
    sizes, device = SMALL if arguments.small else FULL, torch.device("cpu")
    torch.manual_seed(0)
    dinov2 = dinov2_encoder(sizes, device, torch.float32)
    dino = dino_encoder(sizes, device, "float32")
    # Parts are told apart by who calls whom, which takes one thread at a time.
    proposers.ThreadPoolExecutor = lambda workers: ThreadPoolExecutor(1)
    rng = np.random.default_rng(0)
    texts = types.SimpleNamespace(encode=lambda names: rng.standard_normal((len(names), 8)))
    keys = Remembered(dino)
    segmenter = FossilSegmenter(
        Collection(CLASSES, dinov2.dim), dinov2, texts,
        proposers.opencut_proposer(keys, device="cpu"), FossilConfig(windows=sizes["windows"]),
    )  # fmt: skip
    names = class_names(CLASSES)
    segmenter.prepare(names)
    image_hwc = np.asarray(Image.open(arguments.photograph).convert("RGB"))
    print(f"{image_hwc.shape[0]} x {image_hwc.shape[1]}", flush=True)
    row = seconds_by_part(
        {"DINOv2": dinov2, "DINO": dino}, segmenter, [image_hwc], names, device,
        seconds_of=lambda device: time.process_time(),
    )  # fmt: skip
    at_cuts = proposers.opencut_proposer(keys, device="cpu", crf_at="cuts")
    started = time.process_time()
    at_cuts(keys.images)
    with_crf_at_cuts = time.process_time() - started
    result = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "photograph": arguments.photograph.name,
        "size_hw": list(image_hwc.shape[:2]),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)},
        "cpu_s": round(row["seconds_by_part"], 2),
        "parts": {part: round(seconds, 3) for part, seconds in by_size(row["parts"])},
        "opencut_with_crf_at_cuts": round(with_crf_at_cuts, 2),
        "graphs": row["graphs"],
        "masks_of_windows": row["masks_of_windows"],
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "segment_photograph.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text(result))
    sys.stdout.write(text(result))


class Remembered:
    """An encoder that encodes the images of its first call once."""

    def __init__(self, encoder):
        self.encoder, self.images, self.found = encoder, None, None

    def encode(self, images):
        if self.found is None:
            self.images, self.found = images, self.encoder.encode(images)
        return self.found


def text(result):
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cuts = sum(s for part, s in result["parts"].items() if part.startswith("OpenCut"))
    floor = result["parts"]["DINO"] + result["parts"]["DINOv2"]
    rest = result["cpu_s"] - floor
    edged = cuts + result["parts"]["CRF"]
    at_cuts = result["opencut_with_crf_at_cuts"]
    rows = "\n".join(f"| {part} | {seconds:.2f} |" for part, seconds in result["parts"].items())
    height, width = result["size_hw"]
    return f"""# One photograph at FOSSIL's settings

COCO's `{result["photograph"]}`, {height} x {width}, over windows of 448 pixels: CPU seconds of the
process, {result["threads"]} threads, float32; weights of full size, random. {result["machine"]};
{versions}; commit {result["commit"]}, {result["date"]}. Made by
`tests/benchmarks/segment_photograph.py`, whose first lines say how.

| part | CPU s |
|---|---:|
{rows}
| **the whole** | **{result["cpu_s"]:.2f}** |
| of it the backbones | {floor:.2f} |
| of it everything else | {rest:.2f}, {100 * rest / floor:.1f}% of the backbones |
| of it OpenCut | {cuts:.2f} |

{sum(result["graphs"])} graphs were cut in {len(result["graphs"])} batches; masks of the windows:
{", ".join(map(str, result["masks_of_windows"])) or "none"}. Peak memory {result["peak_rss_gb"]} GB.

With a CRF at each cut (`crf_at: cuts`, in the papers' configurations of FOSSIL) OpenCut and its
CRFs take {at_cuts:.1f} s instead of {edged:.1f}, and everything else is
{100 * (rest - edged + at_cuts) / floor:.0f}% of the backbones. The weights are random: real keys
give more cuts and more masks.
"""


if __name__ == "__main__":
    main()
