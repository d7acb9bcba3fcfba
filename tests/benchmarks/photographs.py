"""Runs the recipes for real images on photographs: the miniature's routes, and true masks.

    OMP_NUM_THREADS=1 python tests/benchmarks/photographs.py --data ../shared/data/coco

A stopped run resumes where it stopped; delete the output folder to start over.

The folder has COCO's layout: `captions_*.json`, `instances_*.json` and `images/`. Four builds of
the same captions: GroundingDINO and SAM; MaskFormer and CLIP; the instance masks as proposals that
CLIP matches to the nouns; the instance masks given to the nouns that name them. The models are the
miniature's, which were trained on drawn scenes and know nothing of photographs: what is measured is
that everything runs and is accounted for, and how far the masks are from the true ones.

Writes results/photographs.json and .md after every build, and into the output folder a picture of
each build. The photographs are not the project's: none of them may go into the results.
"""

import argparse
import dataclasses
import json
import platform
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle

from ovref.config import load
from ovref.evaluation.picture_grids import generation_grid
from ovref.models.noun_grounding import Finder, GroundedNoun, Matcher
from ovref.records import YES, ImageRecord
from ovref.stages.ground import Ground, GroundStage
from ovref.stored_images import decode_image
from ovref_inference import ReferenceCollection
from ovref_inference.encoders.load import load_region_encoder, load_text_encoder
from ovref_pipelines import recipe
from ovref_pipelines.recipe import BuildConfig
from ovref_pipelines.verbs.status import place_text
from ovref_pipelines.verbs.verify import verify

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
PICTURED = 6
LOW = 0.05
"""Threshold of the detector's scores on photographs; on scenes they are several times as high."""
PEOPLE = frozenset({
    "adult", "baby", "batter", "boy", "catcher", "child", "couple", "crowd", "friend", "girl",
    "group", "guy", "kid", "lady", "man", "people", "person", "pitcher", "player", "rider",
    "skateboarder", "skier", "snowboarder", "surfer", "toddler", "umpire", "woman",
})  # fmt: skip
"""Nouns of captions that COCO's category `person` shows."""


@dataclass(frozen=True)
class Instances:
    """The true masks of one photograph."""

    masks_nhw: np.ndarray
    """(n, H, W) bool."""
    names: tuple[str, ...]
    """Category of each."""


@lru_cache(1)
def true_masks(data: str) -> dict[str, Instances]:
    """SHA-256 of an image's pixels -> its instances; those of crowds are left out."""
    tree = json.loads(_only(data, "instances_*.json").read_text())
    names = {category["id"]: category["name"] for category in tree["categories"]}
    found = {}
    for image in tree["images"]:
        image_hwc = decode_image((Path(data) / "images" / image["file_name"]).read_bytes())
        own = [a for a in tree["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        masks = [_mask(a["segmentation"], image_hwc.shape[:2]) for a in own]
        stacked = np.stack(masks) if masks else np.zeros((0, *image_hwc.shape[:2]), bool)
        labels = tuple(names[annotation["category_id"]] for annotation in own)
        found[_digest(image_hwc)] = Instances(stacked, labels)
    return found


def _only(data: str, pattern: str) -> Path:
    """The one file of a pattern, of training images where validation's is there too."""
    found = sorted(Path(data).glob(pattern), key=lambda path: "train" not in path.name)
    if not found:
        raise SystemExit(f"there is no {pattern} in {data}")
    return found[0]


def _mask(polygons: list[list[float]], size_hw: tuple[int, int]) -> np.ndarray:
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size_hw))).astype(bool)


def _digest(image_hwc: np.ndarray) -> str:
    return sha256(image_hwc.tobytes()).hexdigest()


def names_it(noun: str, category: str) -> bool:
    """Whether a caption's noun names an instance of the category."""
    return noun == category or (category == "person" and noun in PEOPLE)


@dataclass(frozen=True, kw_only=True)
class GroundByInstances(Ground):
    """The instance masks in the place of a proposer; the route's CLIP is the same."""

    instances: str
    """The data folder."""
    match: Literal["clip", "name"]

    def build(self) -> GroundStage:
        instances = true_masks(self.instances)
        if self.match == "name":
            finder = Finder(_by_name(instances), "instances", "no_instance", {"match": "name"})
        else:
            visual = load_region_encoder(self.proposals.visual, batch_size=self.batch_size)
            texts = load_text_encoder(self.proposals.text)

            def propose(images):
                return [(instances[_digest(image_hwc)].masks_nhw, None) for image_hwc in images]

            matcher = Matcher(propose, visual, texts, self.proposals)
            finder = Finder(matcher, "instances_clip", "no_match", {"match": "clip"})
        return GroundStage(self, finder)


def _by_name(instances: dict[str, Instances]):
    def find(images, nouns):
        for image_hwc, texts in zip(images, nouns, strict=True):
            own = instances[_digest(image_hwc)]
            yield [
                GroundedNoun(noun=number, mask_hw=mask_hw, score=1.0, facts={})
                for number, text in enumerate(texts)
                for mask_hw, name in zip(own.masks_nhw, own.names, strict=True)
                if names_it(text, name)
            ]

    return find


def configurations(data: str, output: str, captions: int | None) -> dict[str, BuildConfig]:
    """Name -> build; `detector` and `proposals` are the shipped recipes with another corpus."""
    corpus = [
        f"corpus.path={_only(data, 'captions_*.json')}", "corpus.format=coco",
        f"corpus.limit={captions or 'null'}",
        f"corpus.images={data}/images", "corpus.corpus_id=photographs",
        "licences=[photographs of COCO, not to be passed on]",
        "engine.engine=local", "engine.workers=1", "engine.threads=1",
    ]  # fmt: skip
    # No box on a photograph reaches the miniature's thresholds.
    lower = [f"ground.detector.detector.{name}_threshold={LOW}" for name in ("box", "text")]
    builds = {
        name: load(BuildConfig, CONFIGS / config, [*corpus, *more, f"output={output}/{name}"])
        for name, config, more in (
            ("detector", "miniature_retclip.yaml", lower),
            ("proposals", "miniature_vocseg.yaml", []),
        )
    }
    second = builds["proposals"]
    for match in ("clip", "name"):
        ground = GroundByInstances(
            proposals=second.ground.proposals, instances=data, match=match, batch_size=8
        )
        name = f"instances_by_{match}"
        builds[name] = dataclasses.replace(second, ground=ground, output=f"{output}/{name}")
    return builds


def measure(config: BuildConfig, data: str) -> dict[str, Any]:
    """Builds, checks that the output is whole, and counts."""
    summary = recipe.build(config, print)
    problems = verify(config.output)
    if problems:
        raise SystemExit("\n".join(problems))
    records = list(_records(config))
    instances = true_masks(data)
    covered, ious = [], []
    for record in records:
        masks_nhw = np.stack([region.mask_hw == YES for region in record.regions])
        covered.append(masks_nhw.any(0).mean())
        own = instances[_digest(record.image_hwc())]
        for region, mask_hw in zip(record.regions, masks_nhw, strict=True):
            true = [
                _iou(mask_hw, true_hw)
                for true_hw, name in zip(own.masks_nhw, own.names, strict=True)
                if names_it(region.noun.text, name)
            ]
            if true:
                ious.append(max(true))
    with ReferenceCollection.open(summary.collection_url) as collection:
        counts = dict(collection.manifest.counts)
        most = Counter({noun: len(collection.references_of(noun)) for noun in collection.nouns})
    prompts, images, references = summary.steps
    return {
        "captions": summary.ingested.captions,
        "captions with nouns": prompts.outputs,
        "images with regions": images.outputs,
        "regions": sum(len(record.regions) for record in records),
        "references": references.outputs,
        "nouns of the collection": counts["nouns"],
        "share of an image that its regions cover": round(float(np.mean(covered)), 3),
        "regions whose noun names an instance": len(ious),
        "IoU of those with the best such instance": round(float(np.mean(ious)), 3),
        "of them at 0.5 or more": round(float(np.mean(np.array(ious) >= 0.5)), 3),
        "dropped captions": dict(summary.ingested.dropped),
        "dropped records": {step.step: step.dropped for step in summary.steps if step.dropped},
        "dropped regions": {
            step.step: step.dropped_parts for step in summary.steps if step.dropped_parts
        },
        "most frequent nouns": dict(most.most_common(10)),
    }


def _records(config: BuildConfig):
    images = recipe.open_steps(config).images
    for shard in images.committed():
        yield from images.read(shard)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.logical_and(a, b).sum() / np.logical_or(a, b).sum())


def contact_sheets(builds: dict[str, BuildConfig], output: str) -> None:
    """One picture a build, of the same captions where all builds have regions of them."""
    by_build = {name: {r.key: r for r in _records(config)} for name, config in builds.items()}
    common = sorted(set.intersection(*map(set, by_build.values())))
    chosen: dict[bytes, str] = {}
    for key in common:  # different photographs
        chosen.setdefault(by_build["detector"][key].image, key)
    for name, records in by_build.items():
        shown: list[ImageRecord] = [records[key] for key in list(chosen.values())[:PICTURED]]
        if shown:
            generation_grid(shown, Path(output) / f"{name}.png", max_nouns=4)


def document(results: dict[str, dict[str, Any]]) -> str:
    """The results as a table; what is a dict goes below it."""
    names = list(results)
    lines = [
        "# Photographs",
        "",
        "The recipes for real images on photographs of COCO train2017 with their captions, "
        "by `tests/benchmarks/photographs.py`. *The models are the miniature's. They were trained "
        "on drawn scenes of 64 x 64 pixels and know nothing of photographs*: these numbers show "
        "that everything runs and is accounted for, and say nothing about the real models. "
        f"One process and one thread on a CPU ({platform.machine()}).",
        "",
        "- `detector`: `configs/miniature_retclip.yaml`, GroundingDINO and SAM, with "
        f"the detector's thresholds at {LOW}, for at its own it finds nothing in photographs.",
        "- `proposals`: `configs/miniature_vocseg.yaml`, MaskFormer and CLIP.",
        "- `instances_by_clip`: COCO's instance masks as proposals, matched to the nouns by CLIP.",
        "- `instances_by_name`: the same masks, given to the nouns that name their category; what "
        "models that make no mistake could find, so far as COCO has annotated it.",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    rows = next(iter(results.values()))
    for row, first in rows.items():
        if not isinstance(first, dict):
            lines.append(f"| {row} | {' | '.join(str(results[name][row]) for name in names)} |")
    for row, first in rows.items():
        if isinstance(first, dict):
            lines += ["", f"{row[0].upper()}{row[1:]}:", ""]
            lines += [f"- `{name}`: {json.dumps(results[name][row])}" for name in names]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of COCO's layout")
    parser.add_argument("--output", default="runs/photographs", help="of the builds and pictures")
    parser.add_argument("--captions", type=int, help="the first so many; all by default")
    arguments = parser.parse_args()
    builds = configurations(arguments.data, arguments.output, arguments.captions)
    results: dict[str, dict[str, Any]] = {}
    for name, config in builds.items():
        results[name] = measure(config, arguments.data)
        (HERE / "results" / "photographs.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "results" / "photographs.md").write_text(document(results))
    contact_sheets(builds, arguments.output)
    print(place_text(builds["detector"].output))


if __name__ == "__main__":
    main()
