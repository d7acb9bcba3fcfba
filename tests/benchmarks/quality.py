"""Filters of references: which wrong references they find, and what that does to FOSSIL's mIoU.

Takes the images of a finished build of the miniature, gives a share of their regions the noun of
another region, embeds and measures them (`embed.measures`), and reduces them with one filter at a
time and with combinations. CLIP's agreement, the score and the entropy have the threshold that
drops a tenth of the references where no noun is wrong; other settings are in the filters' names.
Filters are compared on validation scenes; `--final` measures some of them on test scenes.

    python tests/benchmarks/quality.py --build runs/demo [--work FOLDER] [--seeds 3]
    python tests/benchmarks/quality.py --build runs/demo --final "outliers + CLIP" --seeds 5

Writes results/quality.json and quality.md. Everything resumes: run it again after a kill.
"""

import argparse
import json
import shutil
import warnings
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

from machine import commit
from ovref.config import parse
from ovref.contract import Dropped
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.compare import bootstrap_times, miou_of_samples
from ovref.evaluation.counting import counts_of
from ovref.evaluation.evaluate import EvaluateSpec
from ovref.evaluation.methods import Methods, Row
from ovref.evaluation.report import markdown_table
from ovref.evaluation.totals import Overlaps, overlaps_of
from ovref.identity import spec_identity
from ovref.miniature.shapes import CLASSES
from ovref.ops.measures import MeasureSpec
from ovref.records import Noun, Reference, ScoredImage
from ovref.reduce.collection import reduce_collection
from ovref.reduce.spec import FilterSpec
from ovref.storage.file_store import Store
from ovref.storage.steps import existing_step, open_step
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.output import FOLDER, build_config, open_build

RESULTS = Path(__file__).parent / "results"
SHARES = (0.0, 0.1, 0.3)
QUANTILE = 0.1
ROWS = {"fossil": "FOSSIL", "fossil_oracle": "FOSSIL with oracle masks"}
NONE = "no filter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("runs/demo"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--final", nargs="+", default=[], help="filters, on 200 test scenes")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    build = open_build(str(arguments.build.absolute()))
    settings = build_config(build.store)
    settings.pop(FOLDER, None)
    config = parse(BuildConfig, settings)
    config = replace(config, embed=replace(config.embed, measures=MeasureSpec()))
    spec = EvaluateSpec(
        collection="unused", output="", split="test" if arguments.final else "validation",
        scenes=200 if arguments.final else arguments.scenes, rows=tuple(ROWS), ablate_n=(),
        ablate_k=(), ablate_gamma=(),
    )  # fmt: skip
    settled = [(0.0, 0)] + [(share, n) for share in SHARES[1:] for n in range(arguments.seeds)]
    stage = None
    for share, seed in settled:
        if not (folder_of(work, share, seed) / "wrong.json").exists():
            stage = stage or config.embed.build()
            embed_again(build.step("images"), share, seed, work, config, stage)
    filters = limits_of(folder_of(work, 0.0, 0))
    if arguments.final:
        filters = {name: filters[name] for name in (NONE, *arguments.final)}
    found = measure_all(work, filters, settled, spec, config)
    results = summary(found, list(filters), settled, spec)
    results |= {"thresholds": filters, "date": date.today().isoformat(), "commit": commit()}
    path = RESULTS / "quality.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known["final" if arguments.final else "filters"] = results
    path.write_text(json.dumps(known, indent=1) + "\n")
    (RESULTS / "quality.md").write_text(page(known))
    print(page(known))


def folder_of(work: Path, share: float, seed: int) -> Path:
    return work / f"{share}_{seed}"


def embed_again(images, share, seed, work, config, stage) -> None:
    """Commits the references of the images with a share of wrong nouns; and the keys of those."""
    records = {shard: list(images.read(shard)) for shard in images.committed()}
    regions = [
        (record.key, number, region.noun.text)
        for some in records.values()
        for record in some
        for number, region in enumerate(record.regions)
    ]
    rng = np.random.default_rng(seed)
    wrong = {}
    for at in rng.permutation(len(regions))[: round(share * len(regions))].tolist():
        key, number, noun = regions[at]
        others = [other for _, _, other in regions if other != noun]
        wrong[key, number] = others[int(rng.integers(len(others)))]
    folder = folder_of(work, share, seed)
    step = open_step(
        Store.open(str(folder)), "references",
        {"stages": [spec_identity(config.embed)], "share": share, "seed": seed},
        [images.fingerprint],
    )  # fmt: skip
    done = set(step.committed())
    for shard, some in records.items():
        if shard not in done:
            changed = [renamed(record, wrong) for record in some]
            answers = list(stage(iter(changed)))
            outputs = [answer for answer in answers if isinstance(answer, Reference)]
            drops = [answer for answer in answers if isinstance(answer, Dropped)]
            step.commit(shard, outputs, inputs=len(changed), drops=drops)
    step.finish(list(records))
    made = {key for shard in records for key in step.table(shard, ["key"])["key"].to_pylist()}
    keys = made & {f"{key}#{number}" for key, number in wrong}
    (folder / "wrong.json").write_text(json.dumps(sorted(keys)))


def renamed(record, wrong):
    """The record with the wrong nouns of its regions."""
    regions = [
        replace(
            region,
            noun=Noun(
                text=wrong.get((record.key, number), region.noun.text),
                start=region.noun.start,
                end=region.noun.end,
            ),
        )
        for number, region in enumerate(record.regions)
    ]
    return replace(record, regions=tuple(regions))


def limits_of(folder: Path) -> dict[str, dict]:
    """The settings of each filter, by name, from references without wrong nouns."""
    step = existing_step(Store.open(str(folder)), "references")
    references = [one for shard in step.committed() for one in step.read(shard)]
    entropy = np.array([one.measures["entropy"] for one in references])
    clip = np.array([one.measures["clip"] for one in references])
    score = np.array([one.score for one in references])
    by_clip = {"min_clip_agreement": float(np.quantile(clip, QUANTILE))}
    outliers, agreement = {"outlier_deviations": 3.0}, {"min_noun_agreement": 0.1}
    return {
        NONE: {},
        "CLIP agreement": by_clip,
        "agreement 0.1": agreement,
        "agreement 0.3": {"min_noun_agreement": 0.3},
        "agreement 0.5": {"min_noun_agreement": 0.5},
        "outliers, 3 deviations": outliers,
        "outliers, 2 deviations": {"outlier_deviations": 2.0},
        "score": {"min_score": float(np.quantile(score, QUANTILE))},
        "entropy": {"max_entropy": float(np.quantile(entropy, 1 - QUANTILE))},
        "area 0.02 to 0.6": {"min_area": 0.02, "max_area": 0.6},
        "one component": {"max_components": 1},
        "near duplicates, 0.98": {"duplicate_cosine": 0.98},
        "outliers + CLIP": outliers | by_clip,
        "outliers + agreement 0.1": outliers | agreement,
    }


def measure_all(work, filters, settled, spec, config) -> dict[tuple[str, float, int], dict]:
    """Counts, and overlaps of every row, of each filter on each set of references."""
    data, found = spec.open_data(), {}
    examples = list(data)
    with CachedModels("cpu") as models, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no references for")
        for share, seed in settled:
            for name, limits in filters.items():
                slug = "".join(c if c.isalnum() else "_" for c in name)
                folder = folder_of(work, share, seed) / slug
                kept = folder / f"{spec.split}_{spec.scenes}.npz"
                if not kept.exists():
                    counts = reduced(folder, limits, config, models)
                    kinds = [Row(name=row) for row in ROWS]
                    rows = overlaps(folder / "collection", kinds, spec, data, models, examples)
                    shutil.rmtree(folder / "collection")
                    arrays = {
                        f"{row}_{what}": getattr(one, what)
                        for row, one in zip(ROWS, rows, strict=True)
                        for what in ("right", "either", "true")
                    }
                    np.savez(kept, counts=np.array(counts), **arrays)
                    print(share, seed, name, counts, flush=True)
                with np.load(kept) as arrays:
                    found[name, share, seed] = dict(arrays)
    return found


def reduced(folder: Path, limits: dict, config: BuildConfig, models: CachedModels) -> list[int]:
    """Makes the collection; references before and after, wrong ones, wrong ones left out, and the
    references of the noun that has fewest."""
    wrong = set(json.loads((folder.parent / "wrong.json").read_text()))
    made = reduce_collection(
        existing_step(Store.open(str(folder.parent)), "references"),
        replace(config.reduce, filter=FilterSpec(**limits)),
        embed=config.embed, texts=models.text(config.embed.text),
        output=Store.open(str(folder / "collection")), work=folder / "work",
    )  # fmt: skip
    shutil.rmtree(folder / "work", ignore_errors=True)  # not there where a kill came in between
    with ReferenceCollection.open(folder / "collection") as collection:
        keys = set(collection.to_table(["key"]).column("key").to_pylist())
        counts = dict(zip(collection.nouns, collection.noun_counts.tolist(), strict=True))
    before, after = made["filter"][0]["before"], made["filter"][-1]["after"]
    fewest = min(counts.get(name, 0) for name in CLASSES)
    return [before, after, len(wrong), len(wrong - keys), fewest]


def overlaps(folder: Path, rows, spec, data, models, examples) -> list[Overlaps]:
    """The overlaps of each `Row` with the collection in `folder`, over all scenes."""
    with ReferenceCollection.open(folder) as collection:
        methods = Methods(spec, data, models, collection)
        methods.encode_batch(examples)
        scored = []
        for number, example in enumerate(examples):
            tables = [
                np.insert(counts_of(example, found, data)["confusion"], 0, place, axis=1)
                for place, row in enumerate(rows)
                for found in [methods.predict(row, example.image_hwc)]
            ]
            table = {"confusion": np.concatenate(tables)}
            scored.append(ScoredImage(key=str(number), name=str(number), tables=table, maps={}))
    return overlaps_of(scored, range(len(rows)), len(data.class_names))


def summary(found, names, settled, spec) -> dict:
    """What the page shows, as plain values."""
    times_sn = bootstrap_times(spec.scenes)
    sampled = {
        (key, row): miou_of_samples(
            Overlaps(**{what: one[f"{row}_{what}"] for what in ("right", "either", "true")}),
            times_sn,
        )
        for key, one in found.items()
        for row in ROWS
    }
    rows = []
    for name in names:
        for share in SHARES:
            seeds = [seed for of, seed in settled if of == share]
            counts = np.stack([found[name, share, s]["counts"] for s in seeds])
            before, after, wrong, caught, _ = counts.sum(0).tolist()
            row = {
                "filter": name, "share": share, "seeds": len(seeds),
                "dropped": (before - after) / before,
                "precision": caught / (before - after) if wrong and before > after else None,
                "recall": caught / wrong if wrong else None,
                "fewest": float(counts[:, 4].mean()),
            }  # fmt: skip
            for kind in ROWS:
                own = np.stack([sampled[(name, share, s), kind] for s in seeds])
                gain = own - np.stack([sampled[(NONE, share, s), kind] for s in seeds])
                low, high = np.quantile(resampled(gain[:, 1:]), (0.025, 0.975))
                row[kind] = {
                    "miou": float(own[:, 0].mean()), "of_seeds": own[:, 0].tolist(),
                    "gain": float(gain[:, 0].mean()), "low": float(low), "high": float(high),
                }  # fmt: skip
            rows.append(row)
    return {"split": spec.split, "scenes": spec.scenes, "rows": rows}


def resampled(gain_ns: np.ndarray) -> np.ndarray:
    """(samples,) means over resampled seeds, for (seeds, samples) of resampled scenes."""
    seeds, samples = gain_ns.shape
    chosen = np.random.default_rng(0).integers(seeds, size=(seeds, samples))
    return np.take_along_axis(gain_ns, chosen, axis=0).mean(0)


def page(known: dict) -> str:
    lines = [
        "# Filters of references",
        "",
        "*Measured on the miniature, which says nothing about the real models.*",
        "",
        "The images of a finished build of the miniature; a share of the regions got the noun of",
        "another region, by several seeds. *dropped*: references that the filter leaves out;",
        "*right*: share of those with a wrong noun; *found*: share of all wrong ones that are left",
        "out; *fewest*: references kept of the class that has fewest. mIoU in %, with the",
        "difference from no filter and its 95 % interval by a paired bootstrap over scenes and",
        "seeds. CLIP agreement, score and entropy have the threshold that drops a tenth of the",
        "references where no noun is wrong; agreement is `min_noun_agreement`. Made by",
        "`python tests/benchmarks/quality.py`.",
    ]
    for part, title in (("filters", "Each filter"), ("final", "Chosen filters, test scenes")):
        if part not in known:
            continue
        one = known[part]
        lines += ["", f"## {title}", "", f"{one['scenes']} {one['split']} scenes; "]
        lines[-1] += f"{one['date']}, commit {one['commit']}, CPU."
        for share in SHARES:
            rows = [row for row in one["rows"] if row["share"] == share]
            count = f", {rows[0]['seeds']} seeds" if share else ""
            lines += ["", f"### {share:.0%} of the nouns are wrong{count}", ""]
            heads = ["filter", "dropped", "right", "found", "fewest"]
            heads += [head for title in ROWS.values() for head in (title, "difference")]
            lines += markdown_table(heads, [cells(row) for row in rows])
    return "\n".join(lines) + "\n"


def cells(row: dict) -> list[str]:
    shares = [row["dropped"], row["precision"], row["recall"]]
    line = [row["filter"], *("" if one is None else f"{one:.0%}" for one in shares)]
    line.append(f"{row['fewest']:.0f}")
    for kind in ROWS:
        one = row[kind]
        line.append(f"{100 * one['miou']:.1f}")
        low, high = 100 * one["low"], 100 * one["high"]
        change = f"{100 * one['gain']:+.1f} ({low:+.1f} to {high:+.1f})"
        line.append("" if row["filter"] == NONE else change)
    return line


if __name__ == "__main__":
    main()
