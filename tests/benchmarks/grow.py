"""The loop of `ovref coverage` and `ovref grow`: does the mIoU of weakened classes come back?

Takes a finished build of the miniature, deletes all references of five classes but KEPT each, then
grows the collection with the command until each class has TARGET. FOSSIL is measured before, after
the deletion and after the growth, over the same held-out scenes. All figures are of the miniature.

    python tests/benchmarks/grow.py --build runs/demo [--work FOLDER] [--scenes 200]

Everything resumes: run it again after a kill.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ovref
from ovref.exchange.class_lists import read_classes
from ovref.exchange.coverage import coverage
from ovref.miniature.shapes import CLASSES
from ovref_inference import ReferenceCollection
from ovref_inference.collection import store

WEAKENED = ("boat", "cactus", "fish", "moon", "mushroom")
KEPT = 2
TARGET = 30
SOURCES = {"exchanged": "of a near noun", "template": "from templates"}
ROWS = {"fossil": "FOSSIL", "fossil_oracle": "FOSSIL with oracle masks"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("runs/demo"))
    parser.add_argument("--work", type=Path, default=Path("runs/grow"))
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    classes = work / "classes.txt"
    classes.write_text("".join(f"{name}\n" for name in WEAKENED))

    weakened = work / "weakened"
    if not weakened.exists():
        shutil.copytree(arguments.build, weakened)
        settings = json.loads((weakened / "build.json").read_text())
        (weakened / "build.json").write_text(json.dumps(settings | {"output": str(weakened)}))
        with ReferenceCollection.open(weakened / "collection") as collection:
            gone = [
                number
                for name in WEAKENED
                for number in collection.references_of(name)[KEPT:].tolist()
            ]
        store.tombstone(str(weakened / "collection"), gone, "taken away for a benchmark")
    grown = work / "grown"
    command = [
        sys.executable, "-m", "ovref_pipelines", "grow", weakened, "--classes", classes, "--target",
        TARGET, "--output", grown, "engine.engine=local", "engine.workers=1", "shard_size=16",
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)
    report_of_build = json.loads((grown / "report.json").read_text())
    places = {
        "whole": arguments.build.absolute() / "collection",
        "weakened": weakened / "collection",
        "grown": grown / "collection",
    }
    results = {
        "scenes": arguments.scenes,
        "seconds": sum(step["work_seconds"] for step in report_of_build["steps"]),
        "captions": captions(grown),
        "collections": {
            name: measure(place, work / f"evaluation_{name}", arguments.scenes)
            for name, place in places.items()
        },
    }
    (arguments.output / "grow.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "grow.md").write_text(report(results))
    print(report(results))


def measure(place, output, scenes):
    """mIoU and IoU of each class, and the coverage."""
    found = ovref.evaluate(
        {
            "collection": str(place), "output": str(output), "scenes": scenes, "pictures": 0,
            "rows": list(ROWS), "ablate_n": [], "ablate_k": [], "ablate_gamma": [],
        },
        say=lambda message: None,
    )  # fmt: skip
    with ReferenceCollection.open(place) as collection:
        rows = {row.name: row for row in coverage(collection, read_classes(",".join(CLASSES)))}
    result = {
        "references": {name: rows[name].own for name in CLASSES},
        "tightness": {name: rows[name].tightness for name in WEAKENED},
    }
    return result | {"evaluation": found}


def captions(grown):
    """Captions and the references of their classes that came of them, by where they came from."""
    plan = json.loads((grown / "grow.json").read_text())
    written = Counter(source for _, _, source in plan["captions"])
    with ReferenceCollection.open(grown / "collection") as collection:
        made = set()
        for name in WEAKENED:
            made |= {
                (row["caption"], row["noun"])
                for row in collection.rows(collection.references_of(name))
            }
    kept = Counter(source for text, name, source in plan["captions"] if (text, name) in made)
    return {source: [written[source], kept[source]] for source in written}


def report(results):
    found = {name: one["evaluation"] for name, one in results["collections"].items()}
    iou = {
        name: {row["class"]: row["iou"] for row in one["per_class"]} for name, one in found.items()
    }
    made = ", ".join(
        f"{kept} of {written} {SOURCES[source]}"
        for source, (written, kept) in results["captions"].items()
    )
    lines = [
        "# Weak classes mended by `ovref grow`",
        "",
        f"Of a finished build of the miniature all references of {len(WEAKENED)} classes but "
        f"{KEPT} each were deleted; `ovref grow --target {TARGET}` then wrote captions for the "
        "classes that had fewer, built them and added them. FOSSIL over "
        f"{results['scenes']} test scenes; no figure here is one of a real model. The growth "
        f"took {results['seconds']:.0f} s on one core of a busy machine. Captions that gave a "
        f"reference of their class: {made}. Made by `tests/benchmarks/grow.py`.",
        "",
        "| | whole | weakened | grown |",
        "|---|---:|---:|---:|",
    ]
    for row, title in ROWS.items():
        number = list(ROWS).index(row)
        scores = [100 * one["rows"][number]["miou"] for one in found.values()]
        lines.append(f"| mIoU of {title}, % | " + " | ".join(f"{s:.1f}" for s in scores) + " |")
    means = [100 * sum(iou[name][one] for one in WEAKENED) / len(WEAKENED) for name in iou]
    lines.append("| mean IoU of the five, % | " + " | ".join(f"{s:.1f}" for s in means) + " |")
    for name in WEAKENED:
        lines.append(
            f"| {name}: IoU % (references) | "
            + " | ".join(
                f"{100 * iou[at][name]:.1f} ({one['references'][name]})"
                for at, one in results["collections"].items()
            )
            + " |"
        )
    others = [name for name in CLASSES if name not in WEAKENED]
    means = [100 * sum(iou[name][one] for one in others) / len(others) for name in iou]
    lines.append(
        "| mean IoU of the other classes, % | " + " | ".join(f"{s:.1f}" for s in means) + " |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
