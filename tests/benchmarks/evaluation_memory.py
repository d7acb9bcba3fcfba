"""Peak memory of an evaluation or a segmentation by the number of images, with the miniature's
models.

    python tests/benchmarks/evaluation_memory.py COLLECTION [--images 50 500] [--size 240 320]
        [--verbs evaluate segment] [--output tests/benchmarks/results]

ADE20k as published is drawn into a temporary folder (scenes of the miniature, enlarged; its labels
are the scenes' classes), and `ovref evaluate` or `ovref segment` is run on the first images of it,
each time in a process of its own. The peak is that of the resident set, as the system counts it.
The models are small; what they need is in the peak, whatever the number of images. Results of a
verb that is not measured are kept.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

from machine import commit
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES

COMMAND = """
import json, resource, sys
from ovref.config import parse
from ovref.evaluation.evaluate import EvaluateSpec, evaluate
evaluate(parse(EvaluateSpec, json.loads(sys.argv[1])), lambda line: None, device="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
SEGMENT = """
import resource, sys
from ovref_pipelines.cli import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
VERBS = {
    "evaluate": "`ovref evaluate dataset=ade150`, two rows, 150 classes",
    "segment": "`ovref segment` by FOSSIL, 27 classes, all formats",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection")
    parser.add_argument("--images", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--size", type=int, nargs=2, default=[240, 320], metavar=("H", "W"))
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    path = arguments.output / "evaluation_memory"
    file = path.with_suffix(".json")
    results = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), max(arguments.images), arguments.size)
        for verb in arguments.verbs:
            rows = []
            for count in arguments.images:
                rows.append(measured(verb, folder, count, arguments.collection))
                print(verb, rows[-1], flush=True)
            results[verb] = {
                "size_hw": arguments.size, "date": date.today().isoformat(), "commit": commit(),
                "rows": rows,
            }  # fmt: skip
    file.write_text(json.dumps(results, indent=1) + "\n")
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


def measured(verb, folder, count, collection):
    if verb == "segment":
        photographs = [f"{folder}/images/validation/{seed:06d}.jpg" for seed in range(count)]
        command = [
            SEGMENT, "segment", collection, *photographs, "--classes", ",".join(CLASSES),
            "--formats", "overlay,labels,coco,panoptic", "--output", f"{folder}/segments_{count}",
        ]  # fmt: skip
    else:
        settings = {
            "collection": collection, "output": f"{folder}/out_{count}", "dataset": "ade150",
            "root": folder, "limit": count, "rows": ["fossil_no_proposals", "text_only"],
        }  # fmt: skip
        command = [COMMAND, json.dumps(settings)]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", *command],
        check=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    megabytes = int(done.stdout.split()[-1]) * 1024 / 1e6
    return {"images": count, "peak_mb": round(megabytes), "seconds": time.perf_counter() - started}


def report(results):
    lines = [
        "# Memory of an evaluation and of a segmentation",
        "",
        "Peak resident memory of one process with the miniature's models. Made by "
        "`tests/benchmarks/evaluation_memory.py`, whose first lines say how.",
    ]
    for verb, found in results.items():
        height, width = found["size_hw"]
        lines += [
            "",
            f"{VERBS[verb]}; images of {height} x {width} pixels; {found['date']}, commit "
            f"{found['commit']}, CPU:",
            "",
            "| images | peak, MB |",
            "|---:|---:|",
            *(f"| {row['images']} | {row['peak_mb']} |" for row in found["rows"]),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
