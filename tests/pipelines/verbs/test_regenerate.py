"""References regenerated from their provenance, and estimates, on a real build of the miniature."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recipe_fakes import fake_build
from small_build import captions_of, reference_of

from ovref.config import load
from ovref.errors import InputError, MismatchError
from ovref.reduce.spec import ReduceSpec
from ovref.stages.embed import Embed
from ovref.stages.extract_nouns import ExtractNouns
from ovref.stages.synthesize import Synthesize
from ovref_inference import ReferenceCollection
from ovref_inference.collection.manifest import MANIFEST, manifest_bytes
from ovref_inference.collection.store import read_manifest
from ovref_pipelines import cli, recipe
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.recipe import BuildConfig
from ovref_pipelines.verbs import estimate
from ovref_pipelines.verbs.regenerate import regenerate, text

CONFIGS = Path(__file__).parents[3] / "configs"
SETTINGS = (
    f"corpus.path={CONFIGS / 'miniature_captions.txt'}", "corpus.limit=9", "shard_size=5",
    "synthesize.steps=2", "synthesize.batch_size=3", "engine.engine=local", "engine.workers=1",
)  # fmt: skip


def config_of(output, *more):
    given = {text.partition("=")[0]: text for text in (*SETTINGS, f"output={output}", *more)}
    return load(BuildConfig, CONFIGS / "miniature.yaml", list(given.values()))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The output and the summary."""
    output = tmp_path_factory.mktemp("regenerate") / "out"
    return output, recipe.build(config_of(output))


@pytest.fixture
def collection(built):
    with ReferenceCollection.open(built[0] / "collection") as collection:
        yield collection


def test_a_reference_made_again_alone_is_the_same(built, collection):
    output, _ = built
    found = regenerate(collection, len(collection) - 1, str(output))
    assert found.same
    assert found.mask_iou > 0.99 and found.pixel_difference <= 3
    # Either the bits are equal, or they are in the batch that it was made in.
    assert (found.image_equal and found.bits_equal) or found.equal_in_batch is True


def test_it_is_compared_with_a_textual_embedding_that_is_in_the_index_alone(
    built, collection, tmp_path
):
    output, last = str(built[0]), len(collection) - 1
    place = Path(shutil.copytree(built[0] / "collection", tmp_path / "without"))
    manifest = read_manifest(str(place))
    files = {role: info for role, info in manifest.files.items() if role != "textual"}
    manifest = replace(manifest, files=files, textual_embeddings="in_index", format_version=5)
    (place / MANIFEST).write_bytes(manifest_bytes(manifest))
    (place / "textual.f16.npy").unlink()
    with ReferenceCollection.open(place) as without:
        found, expected = (regenerate(one, last, output) for one in (without, collection))
    assert found.same and found == expected


def test_a_batch_size_that_was_measured_is_taken_from_the_record(tmp_path, monkeypatch):
    """As if the device that drew it had room for three images, and this one for eight."""
    output = tmp_path / "auto"
    config = config_of(output, "corpus.limit=2", "synthesize.batch_size=auto")
    monkeypatch.setattr("ovref.stages.synthesize.USUAL_BATCH_SIZE", 3)
    recipe.build(config)
    monkeypatch.undo()
    asked, build = [], Synthesize.build
    monkeypatch.setattr(
        Synthesize, "build", lambda spec: (asked.append(spec.batch_size), build(spec))[1]
    )
    with ReferenceCollection.open(output / "collection") as collection:
        assert regenerate(collection, 0, str(output)).same
    assert asked == [3]
    found = estimate.estimate(config_of(tmp_path / "new", "synthesize.batch_size=auto"), probe=9)
    assert {step.step: step for step in found.steps}["images"].seconds > 0


def test_another_reference_is_distinguished_from_the_same(built, collection, monkeypatch):
    output, _ = built
    monkeypatch.setattr(collection, "visual", -np.asarray(collection.visual))
    found = regenerate(collection, 0, str(output))
    assert not found.same and not found.bits_equal and found.equal_in_batch is False
    assert found.visual_cosine < -0.99 and found.textual_cosine > 0.99


def test_another_version_of_a_stage_is_tried_and_named(built, collection, monkeypatch, tmp_path):
    monkeypatch.setattr(Synthesize, "version", Synthesize.version + 1)
    found = regenerate(collection, 0, str(built[0]))
    made, now = Synthesize.version - 1, Synthesize.version
    assert found.same
    assert found.other_versions == (f"images by version {made} of synthesize, now {now}",)
    assert "images by version" in text(replace(found, bits_equal=False))
    # Other settings are another matter.
    shutil.copytree(built[0], tmp_path / "out")
    path = tmp_path / "out" / "build.json"
    settings = json.loads(path.read_text())
    settings["synthesize"]["steps"] += 1
    path.write_text(json.dumps(settings))
    with pytest.raises(MismatchError, match="images was made with other settings"):
        regenerate(collection, 0, str(tmp_path / "out"))


def test_a_build_that_did_not_make_it_is_refused(built, collection, tmp_path):
    with pytest.raises(InputError, match="is no output of `ovref build`"):
        regenerate(collection, 0, str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "step.json").write_text("{}")
    with pytest.raises(InputError, match="give the output of the build"):
        regenerate(collection, 0, str(tmp_path))
    with pytest.raises(InputError, match="has no references"):
        regenerate(collection, 10**6, str(built[0]))


def test_the_command_shows_and_makes_again(built, capsys, monkeypatch):
    place = str(built[0] / "collection")
    assert cli.main(["reference", place, "0"]) == 0
    assert "caption" in capsys.readouterr().out
    assert cli.main(["reference", place, "0", "--regenerate"]) == 0
    assert "regenerated alone" in capsys.readouterr().out
    assert cli.main(["reference", place, "-7"]) == cli.MEND_FIRST
    monkeypatch.chdir(place)
    assert cli.main(["reference", ".", "0", "--regenerate"]) == 0
    assert "regenerated alone" in capsys.readouterr().out


def test_an_estimate_of_a_build_that_has_not_begun(built, tmp_path):
    summary = built[1]
    found = estimate.estimate(config_of(tmp_path / "new"), probe=9, price=2.0)
    assert not (tmp_path / "new").exists()
    steps = {step.step: step for step in found.steps}
    assert list(steps) == ["captions", "prompts", "images", "references", "collection"]
    # All captions were probed, so the counts are not estimates.
    made = {step.step: step for step in summary.steps}
    for name in ("prompts", "images", "references"):
        assert steps[name].records == pytest.approx(made[name].inputs)
        assert steps[name].done == 0 and steps[name].source == "probe"
        assert steps[name].seconds > 0 and steps[name].load_seconds > 0
    stored = sum(path.stat().st_size for path in (built[0] / "images").glob("*-*"))
    assert steps["images"].stored == pytest.approx(stored, rel=0.1)
    collection = steps["collection"]
    assert collection.records == pytest.approx(summary.collection["references"])
    assert collection.seconds > 0 and collection.alone_seconds > 0 == collection.done
    size = sum(path.stat().st_size for path in (built[0] / "collection").iterdir())
    assert collection.stored == pytest.approx(size, rel=0.25)
    text = estimate.text(found)
    assert "9 of 9 records missing" in text and "at 2" in text
    total = sum(found.elapsed(step) for step in found.steps)
    assert f"total {duration(total)}" in text


def test_an_estimate_of_a_collection_in_partitions(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "_seconds_a_noun", lambda config, names: 0.01)
    references = [reference_of(caption) for caption in captions_of("000000")]
    whole, parts = (
        estimate._collection(
            fake_build(tmp_path, 3, 3, reduce=ReduceSpec(partition_references=most)),
            references, 1e6, 4000, ready=False,
        )
        for most in (None, 10_000)
    )  # fmt: skip
    assert whole.alone_seconds > parts.alone_seconds > 0  # workers encode the nouns
    assert whole.requests == 0 < parts.requests
    assert parts.seconds > whole.seconds + whole.alone_seconds
    assert parts.stored == whole.stored


def test_what_the_driver_does_alone_is_not_shared_by_workers():
    step = estimate.StepEstimate(
        step="collection", records=9, done=0, seconds=60, alone_seconds=40, load_seconds=2,
        stored=0, source="arithmetic", gpus=0.0,
    )  # fmt: skip
    found = estimate.Estimate(steps=(step,), workers=4, probed=1, device="", price=None)
    assert found.elapsed(step) == 2 + 40 + 60 / 4
    assert found.hours(step) == pytest.approx((60 + 40 + 4 * 2) / 3600)


def test_an_estimate_of_a_finished_build_loads_no_model(built, monkeypatch):
    for spec in (ExtractNouns, Synthesize, Embed):
        monkeypatch.setattr(spec, "build", None)
    found = estimate.estimate(config_of(built[0]), probe=4)
    assert all(found.elapsed(step) == 0 and step.stored == 0 for step in found.steps)
    assert [step.source for step in found.steps] == ["corpus", *["shards"] * 3, "published"]
    assert all(step.done == step.records for step in found.steps)


def test_a_collection_that_is_not_there_yet_is_estimated_without_its_models(built, monkeypatch):
    for spec in (ExtractNouns, Synthesize, Embed):
        monkeypatch.setattr(spec, "build", None)
    config = config_of(built[0], f"collection={built[0] / 'another'}")
    *before, collection = estimate.estimate(config, probe=4).steps
    assert all(step.seconds == 0 for step in before)
    assert collection.source == "arithmetic" and collection.seconds > 0 and collection.stored > 0


def test_an_estimate_of_more_of_the_same_goes_by_the_shards(built, tmp_path):
    """Prompts are there, images are not: the first are not tagged again."""
    config = config_of(tmp_path / "other", "synthesize.steps=1", f"images_from={built[0]}")
    with pytest.raises(MismatchError, match="other settings"):
        estimate.estimate(config, probe=4)
    config = config_of(tmp_path / "other", "embed.batch_size=2", f"images_from={built[0]}")
    steps = {step.step: step for step in estimate.estimate(config, probe=4).steps}
    assert steps["images"].seconds == 0 and steps["images"].source == "shards"
    assert steps["references"].source == "probe" and steps["references"].seconds > 0
