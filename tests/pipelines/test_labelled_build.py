"""Labelled sets through the whole build: labels are nouns, label maps are regions."""

import dataclasses
from pathlib import Path

import pytest

from labelled_scenes import write_ade, write_coco, write_open_images
from ovref.config import load, parse
from ovref.errors import ConfigError, MismatchError
from ovref.miniature.shapes import CLASSES, THINGS
from ovref_inference import ReferenceCollection
from ovref_pipelines import recipe
from ovref_pipelines.recipe import BuildConfig
from ovref_pipelines.verbs.estimate import estimate

SEEDS = range(4_000_000, 4_000_008)


def config(output, corpus, **changes):
    settings = {
        "output": str(output),
        "corpus": {"labels": {}, **corpus},
        "shard_size": 3,
        "extract_nouns": {"source": "labels"},
        "true_masks": {},
        "embed": {
            "visual": {"model": "miniature:dinov2", "size_hw": [64, 64]},
            "text": {"model": "miniature:clip"},
        },
        "engine": {"engine": "local", "workers": 1},
    }
    return parse(BuildConfig, settings | changes)


def test_true_masks_of_an_ade_set_become_a_collection(tmp_path):
    root = tmp_path / "ade"
    names = write_ade(root, SEEDS)
    build = config(
        tmp_path / "out",
        {"path": str(root), "labels": {"dataset": "ade150", "names": str(names)}},
    )
    captions, *_ = estimate(build, probe=2).steps
    assert captions.records == len(SEEDS)
    summary = recipe.build(build)
    assert summary.ingested.captions == len(SEEDS) and summary.quarantined == 0
    folders = recipe.open_steps(build)
    regions = [
        region
        for shard in folders.images.committed()
        for record in folders.images.read(shard)
        for region in record.regions
    ]
    assert {region.source for region in regions} == {"labels"}
    with ReferenceCollection.open(summary.collection_url) as collection:
        assert set(collection.nouns) == {region.noun.text for region in regions} <= set(CLASSES)
        assert len(collection) == len(regions) > 2 * len(SEEDS)
        (made_from,) = collection.manifest.build["provenance"]
        assert made_from["corpus"]["corpus_id"] == "ade150_train"
        assert {model["step"] for model in made_from["models"]} == {"embed"}
    assert recipe.build(build).collection["fingerprint"] == summary.collection["fingerprint"]
    labels = dataclasses.replace(build.corpus.labels, synonyms=True)
    with pytest.raises(MismatchError, match="synonyms"):
        changed = dataclasses.replace(build.corpus, labels=labels)
        recipe.build(dataclasses.replace(build, corpus=changed))


def test_coco_s_instances_become_references_one_by_one(tmp_path):
    path, images = write_coco(tmp_path / "coco", SEEDS)
    build = config(tmp_path / "out", {"path": str(path), "images": str(images)})
    summary = recipe.build(build)
    with ReferenceCollection.open(summary.collection_url) as collection:
        assert set(collection.nouns) <= set(THINGS) and len(collection) > len(SEEDS) / 2


@pytest.mark.slow
def test_a_detector_finds_the_labels_of_a_set(tmp_path):
    root = tmp_path / "ade"
    names = write_ade(root, SEEDS)
    detector = {"model": "miniature:grounding_dino", "box_threshold": 0.2, "text_threshold": 0.2}
    build = config(
        tmp_path / "out",
        {"path": str(root), "labels": {"dataset": "ade150", "names": str(names)}},
        true_masks=None,
        ground={"detector": {"detector": detector, "sam": {"model": "miniature:sam"}}},
    )
    with ReferenceCollection.open(recipe.build(build).collection_url) as collection:
        assert set(collection.nouns) <= set(CLASSES) and len(collection) >= len(SEEDS)


@pytest.mark.slow
def test_open_images_become_a_collection_of_what_people_confirmed(tmp_path):
    """The shipped configuration, with the miniature's models, on files as they are published."""
    path, names, images, said = write_open_images(tmp_path / "open_images", SEEDS)
    small = {"model": "miniature:clip", "size_hw": [64, 64], "precision": "float32"}
    changes = {
        "output": tmp_path / "out", "corpus.path": path, "corpus.images": images,
        "corpus.labels.names": names, "ground.detector.detector.model": "miniature:grounding_dino",
        "ground.detector.detector.box_threshold": 0.2, "shard_size": 4,
        "ground.detector.detector.text_threshold": 0.2,
        "ground.detector.sam.model": "miniature:sam", "embed.text.model": "miniature:clip",
        **{f"embed.visual.{name}": value for name, value in small.items()},
        "engine.engine": "local", "engine.gpus_per_worker": 0,
    }  # fmt: skip
    file = Path(__file__).parents[2] / "configs/retclip_open_images.yaml"
    build = load(BuildConfig, file, [f"{name}={value}" for name, value in changes.items()])
    summary = recipe.build(build)
    assert summary.ingested.captions == len(SEEDS) and summary.quarantined == 0
    assert summary.ingested.dropped == {"no_labels": 1}
    prompts = recipe.open_steps(build).prompts
    asked = {
        record.source.rpartition(":")[2]: {noun.text for noun in record.nouns}
        for shard in prompts.committed()
        for record in prompts.read(shard)
    }
    assert asked == {image: confirmed for image, (confirmed, _) in said.items()}
    with ReferenceCollection.open(summary.collection_url) as collection:
        assert set(collection.nouns) <= set().union(*asked.values())
        assert len(collection) >= len(SEEDS)
        assert "CC BY 2.0" in " ".join(collection.manifest.licences)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extract_nouns": {}}, "set both, or neither"),
        ({"labels": None}, "set both, or neither"),
        ({"draws": 2}, "must be 1"),
        ({"labels": None, "extract_nouns": {}}, "true_masks needs a labelled set"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, changes, message):
    of_corpus = {name: changes.pop(name) for name in ("labels", "draws") if name in changes}
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, {"path": "a.jsonl"} | of_corpus, **changes)
