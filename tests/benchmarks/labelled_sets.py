"""Collections of a labelled set beside a generated one, on the miniature.

    python tests/benchmarks/labelled_sets.py GENERATED [--scenes 400] [--output FOLDER]

GENERATED is a collection of generated images with the same encoders (that of `make demo`). Training
scenes that no model saw are written in ADE20k's layout; collections are built of them by
`ovref build`, with the label maps as regions, and with GroundingDINO and SAM asked for the labels.
All are evaluated by FOSSIL on the same held-out scenes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from ovref.config import parse
from ovref.evaluation.evaluate import EvaluateSpec, evaluate
from ovref_inference import ReferenceCollection
from ovref_pipelines import recipe
from ovref_pipelines.recipe import BuildConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from labelled_scenes import write_ade

FIRST = 4_000_000
ROWS = ("fossil", "fossil_no_proposals", "fossil_oracle")
DETECTOR = {
    "detector": {
        "detector": {
            "model": "miniature:grounding_dino", "box_threshold": 0.2, "text_threshold": 0.2,
        },
        "sam": {"model": "miniature:sam"},
    }
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generated")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ade"
        names = write_ade(root, range(FIRST, FIRST + arguments.scenes))
        collections = {"generated images, attribution": arguments.generated}
        for name, regions in (
            ("labels, true masks", {"true_masks": {}}),
            ("labels, GroundingDINO + SAM", {"ground": DETECTOR}),
        ):
            collections[name] = built(Path(folder) / f"out{len(collections)}", root, names, regions)
        for name, url in collections.items():
            rows.append({"collection": name, **measured(url, Path(folder) / f"e{len(rows)}")})
            print(rows[-1], flush=True)
    path = arguments.output / "labelled_sets"
    results = {"scenes": arguments.scenes, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))


def built(output, root, names, regions):
    """Builds a collection of the set; its URL."""
    config = parse(
        BuildConfig,
        {
            "output": str(output),
            "corpus": {"path": str(root), "labels": {"dataset": "ade150", "names": str(names)}},
            "extract_nouns": {"source": "labels"},
            "embed": {
                "visual": {"model": "miniature:dinov2", "size_hw": [64, 64]},
                "text": {"model": "miniature:clip"},
                "batch_size": 32,
            },
            "reduce": {"prototypes": {"k": 5}},
            "engine": {"engine": "local", "workers": 1},
            **regions,
        },
    )
    return recipe.build(config, print).collection_url


def measured(url, output):
    """Size of a collection, and mIoU by row."""
    spec = EvaluateSpec(
        collection=url, output=str(output), rows=ROWS, ablate_n=(), ablate_k=(), ablate_gamma=(),
        pictures=0,
    )  # fmt: skip
    found = evaluate(spec, lambda line: None, device="cpu")
    with ReferenceCollection.open(url) as collection:
        sizes = {"references": len(collection), "nouns": len(collection.nouns)}
    return sizes | {row: one["miou"] for row, one in zip(ROWS, found["rows"], strict=True)}


def report(results):
    lines = [
        "# Labelled sets as corpora, on the miniature",
        "",
        f"Command: `python tests/benchmarks/labelled_sets.py GENERATED --scenes "
        f"{results['scenes']}`. mIoU of",
        "FOSSIL on 200 held-out scenes, in percent; the encoders are the same. Numbers of the",
        "miniature say nothing about the real models.",
        "",
        "| collection | references | nouns | FOSSIL | without proposals | oracle masks |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        cells = [row["collection"], f"{row['references']:,}", row["nouns"]]
        cells += [f"{100 * row[name]:.1f}" for name in ROWS]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
