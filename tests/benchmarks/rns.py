"""RNS beside FOSSIL, FreeDA and CorrCLIPv2 on the same collections, with paired intervals.

    python tests/benchmarks/rns.py OUTPUT DINO=runs/demo/collection CLIP=runs/clip/collection

Parameters are those of the papers, or were chosen on 100 validation scenes; figures are of 200 test
scenes.
Writes rns.json and rns.md to OUTPUT; finished parts are kept there and not made again.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovref.evaluation.compare import compare, open_run
from ovref.evaluation.evaluate import evaluate
from ovref.evaluation.methods import rows_of
from ovref.evaluation.spec import EvaluateSpec
from ovref_inference.segmenters.corrclip import CorrClipConfig
from ovref_inference.segmenters.freeda import FreedaConfig
from ovref_inference.segmenters.rns import RnsConfig

PUBLISHED = RnsConfig(windows=None)
CHOSEN = RnsConfig(windows=None, max_references=20)
ROWS = ("fossil", "fossil_no_proposals", "freeda", "corrclip", "rns", "rns_no_proposals")
FEW = ", 20 references a class"
AGAINST = ("RNS", f"RNS{FEW}")
"""Rows that all others are compared with."""


def runs_of(output: Path, kind: str, collection: str) -> dict[str, tuple[str, str]]:
    """Evaluates one collection. Returns the folder and the name there of each row."""
    spec = EvaluateSpec(
        collection=collection,
        output=str(output / kind.replace(" ", "_")),
        rows=ROWS,
        # Chosen on validation scenes for the tables of the papers in small.
        freeda=FreedaConfig(n=20, local=0.9, windows=None),
        corrclip=CorrClipConfig(k=5, support=1.0),
        rns=PUBLISHED,
        ablate_n=(), ablate_k=(), ablate_gamma=(), pictures=0,
        features=str(output / "features"),
    )  # fmt: skip
    chosen = replace(spec, output=f"{spec.output}_few", rows=ROWS[-2:], rns=CHOSEN)
    found = {}
    for one, suffix in ((spec, ""), (chosen, FEW)):
        if not Path(one.output, "evaluation.json").exists():
            evaluate(one, device="cpu")
        for row in rows_of(one):
            found[f"{row.title}{suffix}"] = (one.output, row.title)
    return found


def measured(output: Path, runs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """mIoU and accuracy of each row, and its differences to AGAINST."""
    result: dict[str, Any] = {}
    for name, (folder, title) in runs.items():
        run = open_run(folder, title)
        row = run.result["rows"][run.number]
        result[name] = {"miou": row["miou"], "accuracy": row["pixel_accuracy"], "differences": {}}
        for other in AGAINST:
            if other != name:
                found = compare(run, open_run(*runs[other]), output / "compared", pictures=0)
                result[name]["differences"][other] = found["differences"]["miou"]
    return result


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    lines = []
    for title, rows in result.items():
        lines += [
            f"## {title}", "",
            "| | mIoU % | accuracy % | " + " | ".join(f"minus {name}" for name in AGAINST) + " |",
            "|---|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name, row in rows.items():
            cells = [f"{100 * row['miou']:.1f}", f"{100 * row['accuracy']:.1f}"]
            for other in AGAINST:
                one = row["differences"].get(other)
                cells.append(
                    "" if one is None else f"{100 * one['value']:+.1f} "
                    f"({100 * one['low']:+.1f} to {100 * one['high']:+.1f})"
                )  # fmt: skip
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(output: Path, collections: dict[str, str]) -> None:
    """Measures everything that is not there yet, and writes both files."""
    result = {}
    for kind, collection in collections.items():
        result[kind] = measured(output, runs_of(output, kind, collection))
        text = json.dumps(result, indent=1) + "\n"
        (output / "rns.json").write_text(text, encoding="utf-8")
        (output / "rns.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), dict(one.split("=", 1) for one in sys.argv[2:]))
