"""Peak memory of an evaluation by the number of images, with the miniature's models.

    python tests/benchmarks/evaluation_memory.py COLLECTION [--images 50 500] [--size 240 320]
        [--output tests/benchmarks/results]

ADE20k as published is drawn into a temporary folder (scenes of the miniature, enlarged; its labels
are the scenes' classes), and `ovref evaluate` is run on the first images of it, each time in a
process of its own. The peak is that of the resident set, as the system counts it. The models are
small; what they need is in the peak, whatever the number of images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ovref.miniature.scenes import render

COMMAND = """
import json, resource, sys
from ovref.config import parse
from ovref.evaluation.evaluate import EvaluateSpec, evaluate
evaluate(parse(EvaluateSpec, json.loads(sys.argv[1])), lambda line: None, device="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection")
    parser.add_argument("--images", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--size", type=int, nargs=2, default=[240, 320], metavar=("H", "W"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), max(arguments.images), arguments.size)
        for count in arguments.images:
            rows.append(measured(folder, count, arguments.collection))
            print(rows[-1], flush=True)
    results = {"size_hw": arguments.size, "rows": rows}
    path = arguments.output / "evaluation_memory"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))


def draw(folder, count, size_hw):
    for kind in ("images", "annotations"):
        (folder / kind / "validation").mkdir(parents=True)
    for seed in range(count):
        scene = render(seed, "test")
        size = tuple(size_hw[::-1])
        name = f"validation/{seed:06d}"
        Image.fromarray(scene.image_hwc).resize(size).save(folder / f"images/{name}.jpg")
        label_hw = (scene.label_hw + 1).astype(np.uint8)
        Image.fromarray(label_hw).resize(size, Image.Resampling.NEAREST).save(
            folder / f"annotations/{name}.png"
        )


def measured(folder, count, collection):
    settings = {
        "collection": collection, "output": f"{folder}/out_{count}", "dataset": "ade150",
        "root": folder, "limit": count, "rows": ["fossil_no_proposals", "text_only"],
    }  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, json.dumps(settings)],
        check=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    megabytes = int(done.stdout.split()[-1]) * 1024 / 1e6
    return {"images": count, "peak_mb": round(megabytes), "seconds": time.perf_counter() - started}


def report(results):
    height, width = results["size_hw"]
    lines = [
        "# Memory of an evaluation",
        "",
        f"Peak resident memory of `ovref evaluate dataset=ade150` on images of {height} x {width} "
        "pixels with 150 classes, two rows, the miniature's models. Made by "
        "`tests/benchmarks/evaluation_memory.py`, whose first lines say how.",
        "",
        "| images | peak, MB |",
        "|---:|---:|",
        *(f"| {row['images']} | {row['peak_mb']} |" for row in results["rows"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
