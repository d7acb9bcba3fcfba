"""Resident memory of an evaluation while it goes through thousands of images of COCO's size.

    python tests/benchmarks/evaluation_memory.py PHOTOGRAPHS INSTANCES [--images 5000] [--full 16]
        [--batch-size 8] [--passes] [--minutes M] [--output tests/benchmarks/results]

PHOTOGRAPHS is a folder of COCO's images, INSTANCES the JSON file of their masks. COCO-Stuff as
published is written into a temporary folder: 400 crops of the photographs, mirrored or not, at 480
x 640 or 640 x 480 pixels, again and again under other names; label maps hold the instances, and
void elsewhere. `ovref evaluate` runs over them in a process of its own, whose resident set is read
every half second from outside, with the number of images that are scored by then:

- `many`: all images, or those scored within the time limit; 80 classes, the miniature's models,
  FOSSIL without proposals.
- `full`: the first `--full` images at FOSSIL's own sizes, 171 classes: windows of 448 pixels,
  DINOv2's 1369 patches of 1024 numbers, OpenCut on DINO's 3600 patches of 768 with the CRF; the
  backbones have random weights and one layer instead of 24 and 12, so what is measured is all but
  their weights, for batches of `--batch-size` images.
- `--passes`: CPU time of the same backbones for 1, 2 or 4 images in a forward pass.

References are random; which class wins does not change what is kept in memory.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

import ovref
from machine import commit, processor
from ovref.evaluation.named_sets.bundled_classes import bundled_list
from ovref.evaluation.named_sets.coco_masks import open_coco_masks
from ovref.evaluation.named_sets.sets_coco import STUFF_IDS
from ovref.stages.embed import Embed
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig

COMMAND = """
import json, sys
from pathlib import Path
from ovref.config import parse
from ovref.evaluation.evaluate import EvaluateSpec, evaluate
import faiss, pyarrow, skimage, torch, transformers, open_clip
def peak_mb():  # not getrusage's, which begins with the peak of the parent
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    print(int(line.split()[1]) * 1024 / 1e6, flush=True)
peak_mb()
evaluate(parse(EvaluateSpec, json.loads(sys.argv[1])), lambda line: None, device="cpu")
peak_mb()
"""
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SHARD = 50
DISTINCT = 400
REFERENCES = 20
"""References of each class."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path)
    parser.add_argument("instances", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--full", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--passes", action="store_true")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    path = arguments.output / "evaluation_memory.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        count = max(arguments.images, arguments.full)
        write_set(Path(folder), arguments.photographs, arguments.instances, count)
        runs = {"full": arguments.full, "many": arguments.images}
        for name, images in runs.items():
            if images:
                settings = SETTINGS[name](Path(folder))
                if name == "full":
                    settings["batch_size"] = arguments.batch_size
                    name = f"full, {arguments.batch_size}"
                results[name] = about() | watched(
                    Path(folder), name, images, settings, arguments.minutes
                )
                written(path, results)
    if arguments.passes:
        results["passes"] = about() | {"seconds": passes()}
        written(path, results)
    print(report(results))


def written(path, results):
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))


def about():
    return {
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores, one thread",
        "date": datetime.date.today().isoformat(),
    }


def write_set(folder, photographs, instances, count):
    """COCO-Stuff's validation images of crops of photographs."""
    rng = np.random.default_rng(0)
    kept = []
    data = open_coco_masks(photographs, instances)
    names = [name.lower() for name in bundled_list("coco_stuff", "mmseg").names]
    # The last value is of pixels without a mask.
    values = np.array([*(STUFF_IDS[names.index(name)] for name in data.class_names), 255], np.uint8)
    for example in data:
        kept.append((Image.fromarray(example.image_hwc), Image.fromarray(values[example.label_hw])))
    for part in ("val2017", "stuffthingmaps/val2017"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        if number >= DISTINCT:
            for part, end in (("val2017", "jpg"), ("stuffthingmaps/val2017", "png")):
                known = folder / part / f"{number % DISTINCT:012d}.{end}"
                (folder / part / f"{number:012d}.{end}").hardlink_to(known)
            continue
        image, label = kept[number % len(kept)]
        size = (640, 480) if image.width >= image.height else (480, 640)
        scale = rng.uniform(0.7, 1)
        width, height = int(scale * image.width), int(scale * image.height)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        box = (left, top, left + width, top + height)
        mirrored = rng.random() < 0.5
        for one, part, how, end in (
            (image, "val2017", Image.Resampling.BILINEAR, "jpg"),
            (label, "stuffthingmaps/val2017", Image.Resampling.NEAREST, "png"),
        ):
            crop = one.resize(size, how, box=box)
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop
            crop.save(folder / part / f"{number:012d}.{end}")


def collection(folder, visual, dim):
    """A collection of random references of COCO-Stuff's classes."""
    classes = bundled_list("coco_stuff", "mmseg").names
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((len(classes), 1, dim), dtype=np.float32)
    vectors = centres + rng.standard_normal((len(classes), REFERENCES, dim), dtype=np.float32)
    place = str(folder / f"collection_{dim}")
    ovref.collection_from_arrays(
        place,
        ovref.OwnArrays(
            visual=vectors.reshape(-1, dim), nouns=[n for n in classes for _ in range(REFERENCES)]
        ),
        Embed(visual=visual, text=TextEncoderConfig(model="miniature:clip")),
    )
    return place


def many(folder):
    visual = VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64))
    return {
        "collection": collection(folder, visual, 96), "rows": ["fossil_no_proposals"],
        "fossil": {"n": REFERENCES, "k": 10, "windows": None}, "shard_size": SHARD,
        "dataset": "coco80",
    }  # fmt: skip


def backbones():
    """DINOv2 ViT-L/14 and DINO ViT-B/8 with one layer and random weights."""
    dinov2 = transformers.Dinov2Config(
        hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, image_size=518, patch_size=14
    )
    dino = transformers.ViTConfig(num_hidden_layers=1, image_size=224, patch_size=8)
    return transformers.Dinov2Model(dinov2), transformers.ViTModel(dino, add_pooling_layer=False)


def passes():
    """CPU seconds an image by backbone and number of images in a forward pass."""
    torch.set_num_threads(1)
    found = {}
    named = zip(("DINOv2 ViT-L/14, 518", "DINO ViT-B/8, 480"), backbones(), strict=True)
    for (name, model), side in zip(named, (518, 480), strict=True):
        pixels = torch.rand(4, 3, side, side)
        for count in (1, 2, 4):
            started = time.process_time()
            with torch.inference_mode():
                for part in pixels.split(count):
                    model.eval()(pixel_values=part, interpolate_pos_encoding=True)
            seconds = (time.process_time() - started) / len(pixels)
            found.setdefault(name, {})[str(count)] = round(seconds, 2)
    return found


def full(folder):
    dinov2, dino = backbones()
    saved(folder / "dinov2", dinov2, "BitImageProcessor")
    saved(folder / "dino", dino, "ViTImageProcessor")
    visual = VisualEncoderConfig(model=str(folder / "dinov2"), size_hw=(518, 518))
    return {
        "collection": collection(folder, visual, 1024), "rows": ["fossil"], "protocol": "tcl",
        "fossil": {"n": REFERENCES, "k": 10, "windows": None, "floor": None},
        "opencut": {
            "keys": {"model": str(folder / "dino"), "features": "keys", "size_hw": [480, 480]},
            "cut": {},
        },
        "ablate_n": [], "ablate_k": [], "ablate_gamma": [], "shard_size": 8,
        "dataset": "coco_stuff",
    }  # fmt: skip


SETTINGS = {"many": many, "full": full}


def saved(folder, model, processor):
    model.save_pretrained(folder)
    settings = {"image_processor_type": processor, "resample": 3} | IMAGENET
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def watched(folder, name, images, settings, minutes):
    """Runs an evaluation, up to a time limit in minutes, and reads its memory from outside."""
    output = folder / f"out_{name.partition(',')[0]}"
    settings |= {
        "output": str(output), "root": str(folder), "limit": images, "pictures": 0,
    }  # fmt: skip
    commits = output / "scores" / "_commits"
    command = [sys.executable, "-c", COMMAND, json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    samples, until = {}, time.monotonic() + 60 * minutes
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and time.monotonic() < until:
            done = len(list(commits.glob("*.json"))) * settings["shard_size"]
            if (megabytes := resident(process.pid)) is not None:  # a process that ends has none
                samples[done] = max(samples.get(done, 0.0), megabytes)
            time.sleep(0.5)
        if stopped := process.poll() is None:
            process.kill()
        elif process.returncode:
            raise SystemExit(f"the evaluation failed with {process.returncode}")
        output = process.stdout.read().splitlines()
    before = json.loads(output[0])
    peak = max(samples.values()) if stopped else json.loads(output[-1])
    images = max(samples) if stopped else images
    found = {
        "images": images,
        "stopped": stopped,
        "libraries_mb": round(before),
        "peak_mb": round(peak),
        "resident_mb": {done: round(mb, 1) for done, mb in samples.items()},
    }
    steady = [done for done in samples if images / 10 <= done < images]
    if len(steady) > 3:
        slope, _ = np.polyfit(steady, [samples[done] for done in steady], 1)
        found["kb_an_image"] = round(1000 * slope, 3)
    return found


def resident(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def report(results):
    lines = [
        "# Memory of an evaluation",
        "",
        "Resident memory of `ovref evaluate` on images of 480 x 640 pixels cut out of photographs "
        "of COCO. `Libraries` are what the process has before it begins: Python, torch, "
        "transformers. Made by `tests/benchmarks/evaluation_memory.py`, whose first lines say how.",
    ]
    if found := results.get("many"):
        series = {int(done): mb for done, mb in found["resident_mb"].items()}
        wanted = np.linspace(0, found["images"], 11)[1:-1]
        shown = [min(series, key=lambda done: abs(done - at)) for at in wanted]
        slope = found["kb_an_image"]
        last = min(done for done, mb in series.items() if mb == max(series.values()))
        end = "stopped there" if found["stopped"] else "with the tables that are written at the end"
        lines += [
            "",
            f"## {found['images']:,} images, one after the other",
            "",
            "COCO's 80 classes, FOSSIL without proposals, the miniature's models; the largest "
            "resident set by the number of images scored:",
            "",
            "| images | MB |",
            "|---:|---:|",
            *(f"| {done:,} | {series[done]:.0f} |" for done in dict.fromkeys(shown)),
            "",
            f"Peak {found['peak_mb']:,} MB ({end}), of which libraries {found['libraries_mb']} MB. "
            f"A line fitted from a tenth of the images on rises by {slope:.2f} kB an image, "
            f"{slope * 5:.1f} MB in 5,000; the most was seen at {last:,}. {_about(found)}",
        ]
    batches = {name[6:]: found for name, found in results.items() if name[:5] == "full,"}
    if batches:
        lines += [
            "",
            "## FOSSIL at its own sizes, on a CPU",
            "",
            "COCO-Stuff's 171 classes: windows of 448 pixels, DINOv2 at 518 and DINO at 480 pixels "
            "with one layer each, OpenCut, CRF. The layers that are left out, 1.5 GB of weights in "
            "float32, come on top; on a GPU what happens inside of the backbones is not in this "
            "memory. The default batch has 8 images; before, forward passes had up to 32 windows, "
            "now no more than `CPU_PIXELS` of `ovref_inference/encoders/load.py`.",
            "",
            "| images in a batch | images | peak, MB | libraries, MB | above them, MB | commit |",
            "|---|---:|---:|---:|---:|---|",
            *(
                f"| {size} | {found['images']} | {found['peak_mb']:,} | {found['libraries_mb']} | "
                f"{found['peak_mb'] - found['libraries_mb']:,} | {found['commit']} |"
                for size, found in batches.items()
            ),
            "",
            *(_about(found) for found in list(batches.values())[:1]),
        ]
    if found := results.get("passes"):
        lines += [
            "",
            "CPU seconds an image of these backbones, by images in a forward pass, in one run:",
            "",
            "| | 1 | 2 | 4 |",
            "|---|---:|---:|---:|",
            *(
                f"| {name} | {' | '.join(f'{value:.2f}' for value in seconds.values())} |"
                for name, seconds in found["seconds"].items()
            ),
            "",
            _about(found),
        ]
    return "\n".join(lines) + "\n"


def _about(found):
    return f"Commit {found['commit']}, {found['machine']}, {found['date']}."


if __name__ == "__main__":
    main()
