"""Peak memory of `ovref segment` by the number of photographs, with the miniature's models.

    python tests/benchmarks/segment_memory.py COLLECTION [--images 20 100] [--size 120 160]

Scenes of the miniature, enlarged, are segmented by FOSSIL into all formats, each number of them in
a process of its own. The peak is that of the resident set, as the system counts it; Python, torch
and the models are in it, whatever the number of photographs. Writes results/segment_memory.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from PIL import Image

from machine import commit
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES

RESULTS = Path(__file__).parent / "results"
SEGMENT = """
import resource, sys
from ovref_pipelines.cli import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection")
    parser.add_argument("--images", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--size", type=int, nargs=2, default=[120, 160], metavar=("H", "W"))
    arguments = parser.parse_args()
    height, width = arguments.size
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{seed:06d}.png" for seed in range(max(arguments.images))]
        for seed, path in enumerate(paths):
            Image.fromarray(render(seed, "test").image_hwc).resize((width, height)).save(path)
        for count in arguments.images:
            rows.append(f"| {count} | {peak_mb(arguments.collection, paths[:count])} |")
            print(rows[-1], flush=True)
    lines = [
        "# Memory of a segmentation",
        "",
        "Peak resident memory of `ovref segment` by FOSSIL, the miniature's models: photographs of",
        f"{height} x {width} pixels, {len(CLASSES)} classes, overlays, label maps, COCO and",
        f"panoptic JSON. {date.today().isoformat()}, commit {commit()}, CPU. Made by",
        "`tests/benchmarks/segment_memory.py`, whose first lines say how.",
        "",
        "| photographs | peak, MB |",
        "|---:|---:|",
        *rows,
    ]
    (RESULTS / "segment_memory.md").write_text("\n".join(lines) + "\n")


def peak_mb(collection: str, paths: list[str]) -> int:
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable, "-c", SEGMENT, "segment", collection, *paths, "--classes",
            ",".join(CLASSES), "--formats", "overlay,labels,coco,panoptic", "--output", output,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return round(int(done.stdout.split()[-1]) * 1024 / 1e6)


if __name__ == "__main__":
    main()
