"""Filters of references: what they find and what they do to FOSSIL's mIoU when nouns are wrong.

Takes the images of a finished build of the miniature, gives a share of their regions the noun of
another region, embeds and measures them (`embed.measures`), and reduces them with one filter at a
time. A filter that needs a threshold has the one that drops a tenth of the references where no noun
is wrong, or the setting that its name shows. All figures are of the miniature.

    python tests/benchmarks/quality.py --build runs/demo [--work FOLDER] [--scenes 60]

Everything resumes: run it again after a kill.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ovref.config import parse
from ovref.contract import Dropped
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.evaluate import EvaluateSpec
from ovref.evaluation.methods import Methods, Row
from ovref.identity import spec_identity
from ovref.ops.measures import MeasureSpec
from ovref.records import Noun, Reference
from ovref.reduce import FilterSpec, ReduceSpec, reduce_collection
from ovref.storage.file_store import Store
from ovref.storage.steps import existing_step, open_step
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.output import FOLDER, build_config, open_build
from paper_tables.tune import miou

SHARES = (0.0, 0.1, 0.3)
QUANTILE = 0.1
ROW = "fossil_oracle"
"""True masks leave nothing but the references to be right or wrong."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("runs/demo"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    build = open_build(str(arguments.build.absolute()))
    settings = build_config(build.store)
    settings.pop(FOLDER, None)
    config = parse(BuildConfig, settings)
    embed = replace(config.embed, measures=MeasureSpec())
    stage = None
    for share in SHARES:
        if not (work / f"{share}" / "wrong.json").exists():
            stage = stage or embed.build()
            reembed(build.step("images"), share, work / f"{share}", embed, stage)
    found, path = {}, work / "results.json"
    if path.exists():
        found = json.loads(path.read_text())
    filters = thresholds(work / "0.0")
    spec = EvaluateSpec(
        collection="unused", output="", scenes=arguments.scenes, rows=(ROW,), ablate_n=(),
        ablate_k=(), ablate_gamma=(),
    )  # fmt: skip
    data = spec.open_data()
    with CachedModels(folder=str(work / "features")) as models:
        examples = list(data)
        for name, limits in filters.items():
            for share in SHARES:
                key = f"{name}, {share}"
                if key not in found:
                    found[key] = one(work / f"{share}", name, limits, embed, spec, data, models,
                                     examples, config)  # fmt: skip
                    path.write_text(json.dumps(found, indent=1))
                    print(key, found[key], flush=True)
    results = {"scenes": arguments.scenes, "filters": found}
    (arguments.output / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "quality.md").write_text(report(results, list(filters)))
    print(report(results, list(filters)))


def reembed(images, share, folder, embed, stage):
    """Commits the references of the images with a share of wrong nouns; and the wrong ones."""
    records = {shard: list(images.read(shard)) for shard in images.committed()}
    regions = [
        (record.key, number, region.noun.text)
        for some in records.values()
        for record in some
        for number, region in enumerate(record.regions)
    ]
    rng = np.random.default_rng(0)
    wrong = {}
    for at in rng.permutation(len(regions))[: round(share * len(regions))].tolist():
        key, number, noun = regions[at]
        others = [other for _, _, other in regions if other != noun]
        wrong[key, number] = others[int(rng.integers(len(others)))]
    step = open_step(
        Store.open(str(folder)), "references",
        {"stages": [spec_identity(embed)], "share": share}, [images.fingerprint],
    )  # fmt: skip
    done = set(step.committed())
    for shard, some in records.items():
        if shard in done:
            continue
        changed = [
            replace(record, regions=tuple(
                replace(region, noun=Noun(
                    text=wrong.get((record.key, number), region.noun.text),
                    start=region.noun.start, end=region.noun.end,
                ))
                for number, region in enumerate(record.regions)
            ))
            for record in some
        ]  # fmt: skip
        answers = list(stage(iter(changed)))
        outputs = [answer for answer in answers if isinstance(answer, Reference)]
        drops = [answer for answer in answers if isinstance(answer, Dropped)]
        step.commit(shard, outputs, inputs=len(changed), drops=drops)
    step.finish(list(records))
    there = {key for shard in records for key in step.table(shard, ["key"])["key"].to_pylist()}
    keys = there & {f"{key}#{number}" for key, number in wrong}
    (folder / "wrong.json").write_text(json.dumps(sorted(keys)))


def opened(folder):
    return existing_step(Store.open(str(folder)), "references")


def thresholds(folder):
    """The filters, by the name of each."""
    step = opened(folder)
    references = [one for shard in step.committed() for one in step.read(shard)]
    entropy = np.array([one.measures["entropy"] for one in references])
    clip = np.array([one.measures["clip"] for one in references])
    score = np.array([one.score for one in references])
    lowest = {"clip": clip, "score": score}
    limits = {name: float(np.quantile(values, QUANTILE)) for name, values in lowest.items()}
    highest = float(np.quantile(entropy, 1 - QUANTILE))
    return {
        "no filter": {},
        "CLIP agreement": {"min_clip_agreement": limits["clip"]},
        "agreement among references, 0.3": {"min_noun_agreement": 0.3},
        "outliers, 3 deviations": {"outlier_deviations": 3.0},
        "score (contrast)": {"min_score": limits["score"]},
        "entropy": {"max_entropy": highest},
        "area 0.02 to 0.6": {"min_area": 0.02, "max_area": 0.6},
        "components, 1": {"max_components": 1},
        "near duplicates, 0.98": {"duplicate_cosine": 0.98},
    }


def one(folder, name, limits, embed, spec, data, models, examples, config):
    """Counts and mIoU of one filter on one share of wrong nouns."""
    wrong = set(json.loads((folder / "wrong.json").read_text()))
    place = folder / "".join(c if c.isalnum() else "_" for c in name)
    summary = reduce_collection(
        opened(folder),
        ReduceSpec(prototypes=config.reduce.prototypes, filter=FilterSpec(**limits)),
        embed=embed,
        texts=models.text(embed.text),
        output=Store.open(str(place)),
        work=folder / "work",
    )
    before, after = summary["filter"][0]["before"], summary["filter"][-1]["after"]
    with ReferenceCollection.open(place) as collection:
        keys = set(collection.to_table(["key"]).column("key").to_pylist())
        methods = Methods(spec, data, models, collection)
        methods.look_at(examples)
        score = miou(methods.segmenter(Row(name=ROW)), examples, data.class_names)
    return {
        "before": before,
        "after": after,
        "wrong": len(wrong),
        "found": len(wrong - keys),
        "nouns": len(collection.nouns),
        "miou": score,
    }


def report(results, names):
    heads = [f"{share:.0%} wrong: dropped, right, found | mIoU" for share in SHARES]
    lines = [
        "# Filters of references",
        "",
        "The images of a finished build of the miniature; no figure here is one of a real model. A "
        "share of the regions got the noun of another one. *dropped*: references that the filter "
        "leaves out; *right*: share of those with a wrong noun; *found*: share of all wrong ones "
        f"that it leaves out. mIoU of FOSSIL over {results['scenes']} test scenes, in %, with "
        "true masks. Thresholds drop a tenth of the references where no "
        "noun is wrong, or are named. Made by `tests/benchmarks/quality.py`.",
        "",
        f"| filter | {' | '.join(heads)} |",
        "|---|" + "---|---:|" * len(SHARES),
    ]  # fmt: skip
    for name in names:
        cells = []
        for share in SHARES:
            one = results["filters"][f"{name}, {share}"]
            dropped = one["before"] - one["after"]
            text = f"{dropped / one['before']:.0%}"
            if one["wrong"]:
                right = one["found"] / dropped if dropped else 0
                text += f", {right:.0%}, {one['found'] / one['wrong']:.0%}"
            cells += [text, f"{100 * one['miou']:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
