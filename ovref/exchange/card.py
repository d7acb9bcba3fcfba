"""README.md of a published collection, which the Hub shows as the card of a data set."""

import json
from typing import Any

from ovref.evaluation.report import markdown_table, percent
from ovref_inference.collection import format as fmt

SUMS, SAMPLES = "SHA256SUMS", "samples.png"
NOUNS = 20
"""Number of nouns named on the card."""


def card(
    manifest: fmt.AnyManifest,
    title: str,
    target: str,
    evaluation: dict[str, Any] | None,
    files: list[str],
    nouns: list[tuple[str, int]],
) -> str:
    """The data set card: contents, models, licences, evaluation, and how to load it.

    Args:
        title: of the card; target: where the collection can be opened.
        evaluation: content of its evaluation.json, or None.
        files: names of those that are published with it.
        nouns: all of its nouns, each with its number of references.
    """
    counts = manifest.counts
    front = [
        "---", f"pretty_name: {json.dumps(title, ensure_ascii=False)}", "license: other",
        "task_categories: [image-segmentation]", "tags: [ovref, reference-collection]",
    ]  # fmt: skip
    pictures = [name for name in files if name.startswith("pictures-")]
    if pictures:
        front += [
            "configs:", "- config_name: pictures", "  data_files: pictures-*.parquet",
        ]  # fmt: skip
    lines = [
        *front, "---", f"# {title}", "",
        "A reference collection for training-free open-vocabulary segmentation, built with ovref: "
        f"{counts['references']:,} references of {counts['nouns']:,} nouns, "
        f"{counts['prototypes']:,} prototypes.",
        "", "```python", "import ovref_inference",
        f'collection = ovref_inference.open("{target}")',
        'segmenter = collection.segmenter("fossil")', "```", "",
    ]  # fmt: skip
    if SAMPLES in files:
        lines += [f"![Some references with their masks]({SAMPLES})", ""]
    lines += ["## What is in it", ""]
    most = sorted(nouns, key=lambda pair: (-pair[1], pair[0]))[:NOUNS]
    shown = ", ".join(f"{noun} ({count:,})" for noun, count in most)
    lines += [f"Most frequent nouns: {shown}.", ""]
    lines += [
        "| embedding | model | revision | width |", "|---|---|---|---:|",
        *(
            f"| {kind} | `{encoder.model}` | {encoder.revision or '-'} | {encoder.dim} |"
            for kind, encoder in (("visual", manifest.visual), ("textual", manifest.textual))
        ), "",
    ]  # fmt: skip
    lines.append(
        "The images are in `pictures-*.parquet`, with the mask of every reference."
        if pictures
        else "Embeddings only: the images are not part of it."
    )
    lines += ["", "## How it was made", ""]
    made = [one for one in manifest.build.get("provenance", []) if "models" in one]
    models = {model["model"]: model for one in made for model in one["models"]}
    if models:
        lines += ["| step | model | licence |", "|---|---|---|"]
        for model in models.values():
            lines.append(f"| {model['step']} | `{model['model']}` | {model['licence']} |")
        lines.append("")
    for one in made:
        lines.append(f"Captions: {one['corpus']['corpus_id']}, licence {one['corpus']['licence']}.")
    lines += ["", "## Licences of what it was made from", ""]
    lines += [f"- {line}" for line in manifest.licences] or ["Nothing is stated."]
    lines += ["", "## How it was measured", "", *_measured(evaluation), ""]
    lines += [
        f"Fingerprint `{manifest.fingerprint}`, format version {manifest.format_version}. "
        f"`sha256sum -c {SUMS}` checks the files.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _measured(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["It was not measured, or nothing was said of it."]
    rows = [
        [row["name"], *(percent(row.get(name)) or "-" for name in ("miou", "pixel_accuracy"))]
        for row in evaluation["rows"]
    ]
    return [
        f"{evaluation['caption']} Data: {evaluation['data']}.", "",
        *markdown_table(["segmenter", "mIoU %", "pixel accuracy %"], rows),
    ]  # fmt: skip
