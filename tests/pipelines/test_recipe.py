"""The recipe from captions to a collection, with small fakes in place of the models."""

import dataclasses
import io
import json
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_fakes import files_of
from recipe_fakes import FakeTexts

from ovref.contract import Dropped
from ovref.corpora import CorpusSpec
from ovref.errors import InputError, MismatchError, ModelError
from ovref.identity import record_seed
from ovref.models.noun_grounding import ProposalRoute
from ovref.records import YES, ImageRecord, Noun, Prompt, Reference, Region
from ovref.reduce.spec import FilterSpec, ReduceSpec
from ovref.select_prompts import SelectPrompts
from ovref.stages.embed import Embed
from ovref.stages.extract_nouns import ExtractNouns
from ovref.stages.ground import Ground
from ovref.stages.synthesize import Synthesize
from ovref.storage.file_store import Store
from ovref.stored_images import UnusableImageError, plain_image
from ovref_inference import ReferenceCollection
from ovref_inference.collection.format import CollectionError
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.proposers.config import MaskFormerConfig, ProposerConfig
from ovref_pipelines import commands, recipe
from ovref_pipelines.console import Console
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.output import STEPS
from ovref_pipelines.recipe import BuildConfig
from ovref_pipelines.verbs import show
from ovref_pipelines.verbs.status import place_text
from ovref_pipelines.verbs.verify import verify

CAPTIONS = [
    f"a {colour} {thing}"
    for colour in ("red", "blue", "green")
    for thing in ("cup", "boat", "tree", "house")
]


class FakeNouns(ExtractNouns):
    def check(self):
        self.build()
        return []

    def build(self):
        def stage(captions):
            for caption in captions:
                text = caption.text.split()[-1]
                start = caption.text.index(text)
                noun = Noun(text=text, start=start, end=start + len(text))
                yield Prompt(
                    key=caption.key,
                    caption=caption.text,
                    nouns=(noun,),
                    source=caption.source,
                    image=caption.image,
                )

        return stage


class FakeSynthesize(Synthesize):
    """Blank images of a colour that comes from the seed; captions with `broken` raise."""

    def check(self):
        self.build()
        return []

    def build(self):
        def stage(prompts):
            for prompt in prompts:
                if "broken" in prompt.caption:
                    raise RuntimeError("the kernel failed")
                seed = record_seed(self.run_seed, prompt.key)
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (seed % 251, seed % 241, seed % 239)).save(buffer, "PNG")
                mask_hw = np.full((8, 8), YES, np.uint8)
                region = Region(noun=prompt.nouns[0], mask_hw=mask_hw, score=1.0, source="daam")
                yield ImageRecord(
                    key=prompt.key,
                    caption=prompt.caption,
                    source=prompt.source,
                    image=buffer.getvalue(),
                    regions=(region,),
                    seed=seed,
                )

        return stage


class FakeGrounding(Ground):
    """The whole image for each noun, except in images that are not decodable."""

    def check(self):
        self.build()
        return []

    def build(self):
        def stage(prompts):
            for prompt in prompts:
                try:
                    file, image_hwc = plain_image(prompt.image)
                except UnusableImageError as error:
                    yield Dropped(prompt.key, error.reason)
                    continue
                mask_hw = np.full(image_hwc.shape[:2], YES, np.uint8)
                region = Region(noun=prompt.nouns[0], mask_hw=mask_hw, score=0.5, source="fake")
                yield ImageRecord(
                    key=prompt.key,
                    caption=prompt.caption,
                    source=prompt.source,
                    image=file,
                    regions=(region,),
                )

        return stage


class FakeEmbedding(Embed):
    def check(self):
        self.build()
        return []

    def build(self):
        texts = FakeTexts()

        def stage(images):
            for image in images:
                vectors = texts.encode([image.regions[0].noun.text, image.caption])
                yield Reference(
                    key=f"{image.key}#0",
                    noun=image.regions[0].noun,
                    caption=image.caption,
                    box_xyxy=(0, 0, 8, 8),
                    area=1.0,
                    score=1.0,
                    source="daam",
                    seed=image.seed,
                    visual=vectors[1].astype(np.float16),
                    textual=vectors[0].astype(np.float16),
                )

        return stage


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A build of twelve captions in four shards, none of whose stages needs a model."""
    monkeypatch.setattr(recipe, "_LazyTexts", FakeTexts)
    corpus = tmp_path / "captions.txt"
    corpus.write_text("\n".join(CAPTIONS) + "\n")
    return BuildConfig(
        output=str(tmp_path / "out"),
        corpus=CorpusSpec(path=str(corpus)),
        extract_nouns=FakeNouns(),
        synthesize=FakeSynthesize(model="fake"),
        embed=FakeEmbedding(
            visual=VisualEncoderConfig(model="fake"), text=TextEncoderConfig(model="fake")
        ),
        shard_size=3,
        engine=EngineConfig(engine="local"),
    )


@pytest.fixture
def grounded(config, tmp_path):
    """A build of the same captions with an image each, the last of which is damaged."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number:02d}.txt").write_text(caption)
        Image.new("RGB", (12, 8), (20 * number, 0, 9)).save(folder / f"{number:02d}.png")
    whole = (folder / "11.png").read_bytes()
    (folder / "11.png").write_bytes(whole[: len(whole) - 30])
    route = ProposalRoute(
        proposer=ProposerConfig(mask_former=MaskFormerConfig(model="fake")),
        visual=VisualEncoderConfig(model="fake", library="open_clip"),
        text=TextEncoderConfig(model="fake"),
    )
    return dataclasses.replace(
        config,
        corpus=CorpusSpec(path=str(folder)),
        synthesize=None,
        ground=FakeGrounding(proposals=route),
    )


def contents(config):
    """Bytes of all shards of all steps."""
    folders = recipe.open_steps(config)
    steps = [getattr(folders, name) for name in STEPS]
    return {step.name: files_of(step) for step in steps if step is not None}


def test_from_captions_to_a_collection(config):
    said = []
    summary = recipe.build(config, said.append)
    assert summary.ingested.captions == 12 and summary.ingested.shards == 4
    assert [step.outputs for step in summary.steps] == [12, 12, 12]
    with ReferenceCollection.open(summary.collection_url) as collection:
        assert len(collection) == 12
        assert sorted(collection.nouns) == ["boat", "cup", "house", "tree"]
    report = json.loads(Store.open(config.output).read("report.json"))
    assert report["steps"][1]["step"] == "images" and report["collection"]["added"] == 12
    kept = json.loads(Store.open(config.output).read("build.json"))
    assert kept["shard_size"] == 3 and kept["synthesize"]["steps"] == 25
    assert said[-1].startswith("collection: done")


def test_what_is_there_is_not_made_again(config):
    first = recipe.build(config)
    before = contents(config)
    again = recipe.build(config)
    assert [step.committed_now for step in again.steps] == [0, 0, 0]
    assert again.collection["fingerprint"] == first.collection["fingerprint"]
    assert contents(config) == before


def test_a_relative_output_means_the_same_for_every_worker(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = recipe.open_steps(dataclasses.replace(config, output="out"))
    assert folders.images.store.url == str(tmp_path / "out" / "images")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = dataclasses.replace(config, output="~/out", work="~/work")
    assert Store.open(at_home.output).url == str(tmp_path / "home" / "out")
    assert recipe.work_folder(Store.open(at_home.output), "~/work") == tmp_path / "home" / "work"


def test_two_builds_of_one_config_are_the_same_bytes(config, tmp_path):
    recipe.build(config)
    other = dataclasses.replace(config, output=str(tmp_path / "other"))
    recipe.build(other)
    assert contents(config) == contents(other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shard_size": 4}, "captions was made with other settings: shard_size"),
        (
            {"synthesize": FakeSynthesize(model="fake", steps=9)},
            "images was made with other settings",
        ),
        ({"extract_nouns": FakeNouns(max_nouns=1)}, "prompts was made with other settings"),
    ],
)
def test_an_output_of_other_settings_is_refused_before_anything_runs(config, change, says):
    recipe.build(config)
    with pytest.raises(MismatchError, match=says):
        recipe.build(dataclasses.replace(config, **change))


def test_another_embedding_of_images_that_are_there_says_how_to_keep_them(config):
    other = FakeEmbedding(visual=config.embed.visual, text=TextEncoderConfig(model="another"))
    recipe.build(config)
    folders = recipe.open_steps(config)
    upstream = folders.images.store.url.removesuffix("/images")
    with pytest.raises(MismatchError, match=f"Another output with images_from={upstream} embeds"):
        recipe.open_steps(dataclasses.replace(config, embed=other))


def test_settings_that_change_no_bytes_may_change(config):
    recipe.build(config)
    engine = EngineConfig(engine="local", attempts=5, threads=2)
    again = recipe.build(dataclasses.replace(config, engine=engine))
    assert [step.committed_now for step in again.steps] == [0, 0, 0]


def test_failed_shards_hold_the_collection_back_until_they_are_allowed_to_lack(config):
    with open(config.corpus.path, "a") as file:
        file.write("a broken cup\n")
    summary = recipe.build(config)
    assert summary.quarantined == 1 and summary.collection is None
    assert [step.committed for step in summary.steps] == [5, 4, 4]
    text = show.build_summary(summary)
    assert "FAILED: 1 shards of images" in text and "No collection was published" in text
    assert "quarantined: 000004" in place_text(config.output)

    summary = recipe.build(dataclasses.replace(config, allow_incomplete=True))
    assert summary.quarantined == 1 and summary.collection["added"] == 12


def test_common_nouns_are_generated_no_more_often_than_asked(config):
    capped = dataclasses.replace(config, select_prompts=SelectPrompts(max_per_noun=1))
    summary = recipe.build(capped)
    assert [step.step for step in summary.steps] == ["prompts", "selected", "images", "references"]
    assert summary.steps[1].dropped == {"nouns_capped": 8}
    assert summary.collection["added"] == 4
    assert [step.committed_now for step in recipe.build(capped).steps] == [0, 0, 0, 0]
    assert "selected: 4 of 4 shards committed, complete" in place_text(config.output)


def test_another_embedding_of_images_that_are_there(config, tmp_path):
    recipe.build(config)
    text = TextEncoderConfig(model="another")
    second = dataclasses.replace(
        config,
        output=str(tmp_path / "second"),
        images_from=config.output,
        embed=FakeEmbedding(visual=config.embed.visual, text=text),
    )
    summary = recipe.build(second)
    assert [step.committed_now for step in summary.steps] == [0, 0, 4]
    assert not (tmp_path / "second" / "images").exists()
    with ReferenceCollection.open(summary.collection_url) as collection:
        assert collection.manifest.textual.model == "another"
    assert f"images come from {config.output}" in place_text(second.output)
    show.draw_samples(second.output, str(tmp_path / "new" / "samples.png"))
    assert (tmp_path / "new" / "samples.png").exists()
    with pytest.raises(InputError, match=r"is no output of `ovref build`"):
        show.draw_samples(summary.collection_url, str(tmp_path / "samples.png"))


def test_a_collection_grows_in_place_by_another_corpus(config, tmp_path):
    first = recipe.build(config)
    assert "added" not in show.build_summary(first)
    more = tmp_path / "more.txt"
    more.write_text("a pink cup\na pink kite\n")
    second = dataclasses.replace(
        config,
        output=str(tmp_path / "second"),
        corpus=CorpusSpec(path=str(more)),
        base=first.collection_url,
        collection=first.collection_url,
    )
    grown = recipe.build(second)
    assert grown.collection["added"] == 2
    assert "; 2 added" in show.build_summary(grown)
    with ReferenceCollection.open(first.collection_url) as collection:
        assert len(collection) == 14 and "kite" in collection.nouns


def test_a_base_of_another_kind_is_refused_before_anything_is_written(config, tmp_path, capsys):
    first = recipe.build(config)
    divided = ReduceSpec(partition_references=5)
    second = dataclasses.replace(config, output=str(tmp_path / "second"), reduce=divided)
    for base, error, says in (
        (first.collection_url, MismatchError, "is one undivided collection, which growing does"),
        (str(tmp_path / "none"), CollectionError, "none"),
    ):
        asked = dataclasses.replace(second, base=base)
        with pytest.raises(error, match=says):
            recipe.build(asked)
        with pytest.raises(error, match=says):
            commands._dry_run(asked, Namespace(probe=0), Console())
        assert not Path(second.output).exists()
    assert "step" not in capsys.readouterr().out


def test_reducing_again_with_other_settings_needs_leave(config):
    recipe.build(config)
    folders = recipe.open_steps(config)
    other = dataclasses.replace(config, reduce=ReduceSpec(seed=5))
    with pytest.raises(MismatchError, match=r"holds another collection .*set replace=true"):
        recipe.reduce(other, folders, lambda message: None)
    result = recipe.reduce(dataclasses.replace(other, replace=True), folders, lambda message: None)
    assert result["added"] == 12


def test_a_noun_that_a_filter_leaves_nothing_of_is_said(config):
    strict = ReduceSpec(filter=FilterSpec(blocked_captions=("cup", "red house")))
    said = []
    summary = recipe.build(dataclasses.replace(config, reduce=strict), said.append)
    wanted = "WARNING: the filters dropped all references of 1 noun: cup (3); relax reduce.filter"
    assert [wanted in line for line in said].count(True) == 1
    assert summary.collection["lost_nouns"]["nouns"] == 1
    for place in (config.output, summary.collection_url):
        assert wanted in place_text(place)
    said.clear()
    again = dataclasses.replace(config, replace=True)
    recipe.reduce(again, recipe.open_steps(again), said.append)
    assert "filters dropped" not in place_text(config.output) + "".join(said)


def test_the_plan_counts_what_is_missing(config):
    recipe.build(config)
    other = dataclasses.replace(config, output=config.output + "2")
    assert "4 of 4" not in show.plan(recipe.open_steps(config))
    assert "captions: corpus not read yet" in show.plan(recipe.open_steps(other))


def test_samples_are_drawn_from_finished_images(config, tmp_path):
    recipe.create_steps(config, recipe.open_steps(config))
    with pytest.raises(InputError, match="no images"):
        show.draw_samples(config.output, str(tmp_path / "samples.png"))
    recipe.build(config)
    show.draw_samples(config.output, str(tmp_path / "samples.png"))
    with Image.open(tmp_path / "samples.png") as image:
        assert image.width > 100


def test_a_build_from_images_with_captions(grounded, tmp_path):
    summary = recipe.build(grounded)
    assert [step.outputs for step in summary.steps] == [12, 11, 11]
    assert summary.steps[1].dropped == {"truncated_image": 1}
    folders = recipe.open_steps(grounded)
    records = [
        record for shard in folders.images.committed() for record in folders.images.read(shard)
    ]
    files = [(tmp_path / "pairs" / f"{number:02d}.png").read_bytes() for number in range(11)]
    assert [record.image for record in records] == files
    assert all(record.seed is None and record.heatmaps_nhw is None for record in records)
    with ReferenceCollection.open(summary.collection_url) as collection:
        assert len(collection) == 11

    before = contents(grounded)
    assert [step.committed_now for step in recipe.build(grounded).steps] == [0, 0, 0]
    assert contents(grounded) == before
    other = dataclasses.replace(grounded, output=str(tmp_path / "other"))
    recipe.build(other)
    assert contents(other) == before

    vocabulary = json.loads(Store.open(grounded.output).read("vocabulary.json"))
    assert vocabulary["captions"] == 12 and ["cup", 3] in vocabulary["top"]


def test_a_build_from_images_is_shown_checked_and_refused_like_any_other(grounded, tmp_path):
    recipe.build(grounded)
    shown = place_text(grounded.output)
    assert "images: 4 of 4 shards committed, complete, 12 records in, 11 out" in shown
    show.draw_samples(grounded.output, str(tmp_path / "samples.png"))
    with Image.open(tmp_path / "samples.png") as image:
        assert image.width > 100
    assert verify(grounded.output) == []
    assert "truncated_image" in place_text(grounded.output)

    route = dataclasses.replace(grounded.ground, min_area=0.5)
    with pytest.raises(MismatchError, match="images was made with other settings"):
        recipe.build(dataclasses.replace(grounded, ground=route))
    synthesize = FakeSynthesize(model="fake")
    with pytest.raises(MismatchError, match="captions was made with other settings: with_images"):
        recipe.build(dataclasses.replace(grounded, ground=None, synthesize=synthesize))


def test_another_embedding_of_real_images_that_are_there(grounded, tmp_path):
    recipe.build(grounded)
    second = dataclasses.replace(
        grounded,
        output=str(tmp_path / "second"),
        images_from=grounded.output,
        embed=FakeEmbedding(visual=grounded.embed.visual, text=TextEncoderConfig(model="another")),
    )
    assert [step.committed_now for step in recipe.build(second).steps] == [0, 0, 4]


def test_images_are_generated_or_the_corpus_s_own(config, grounded):
    with pytest.raises(ValueError, match=r"generated .* own .*, found synthesize and ground"):
        dataclasses.replace(grounded, synthesize=config.synthesize)
    with pytest.raises(ValueError, match="found none"):
        dataclasses.replace(grounded, ground=None)
    drawn_twice = dataclasses.replace(grounded.corpus, draws=2)
    with pytest.raises(ValueError, match=r"corpus\.draws .* must be 1, found 2"):
        dataclasses.replace(grounded, corpus=drawn_twice)


def test_a_corpus_without_images_cannot_be_grounded(config, grounded):
    with pytest.raises(InputError, match="has captions only"):
        recipe.build(dataclasses.replace(grounded, corpus=config.corpus))


def test_steps_and_collection_on_s3(config, s3_environment, monkeypatch, tmp_path):
    monkeypatch.setenv("OVREF_CACHE", str(tmp_path / "cache"))
    remote = dataclasses.replace(config, output="s3://bucket/recipe")
    work = recipe.work_folder(Store.open(remote.output), None)
    assert work.name == f"ovref_reduce_{os.getuid()}"
    remote = dataclasses.replace(remote, work=str(tmp_path / "work"))
    summary = recipe.build(remote)
    assert summary.collection["added"] == 12
    assert [step.committed_now for step in recipe.build(remote).steps] == [0, 0, 0]
    assert "collection: s3://bucket/recipe/collection, " in place_text("s3://bucket/recipe")
    recipe.build(config)
    assert contents(remote) == contents(config)


@pytest.mark.parametrize("typo", [
    {"shard_size": 5}, {"extract_nouns": FakeNouns(max_nouns=1)},
    {"synthesize": FakeSynthesize(model="fake", steps=9)},
])  # fmt: skip
def test_steps_without_a_shard_do_not_block_the_corrected_command(config, typo):
    wrong = dataclasses.replace(config, **typo)
    recipe.create_steps(wrong, recipe.open_steps(wrong))
    assert show.plan(recipe.open_steps(config)).count("all shards missing") == 3
    summary = recipe.build(config)
    assert summary.collection["added"] == 12
    with pytest.raises(MismatchError, match="was made with other settings"):
        recipe.open_steps(wrong)


def test_a_build_whose_empty_step_another_one_has_begun_anew_stops(config):
    folders = recipe.open_steps(config)
    recipe.create_steps(config, folders)
    other = dataclasses.replace(config, shard_size=5)
    recipe.create_steps(other, recipe.open_steps(other))
    with pytest.raises(MismatchError, match="started over with other settings by another build"):
        folders.captions.commit("000000", [], inputs=0)
    assert recipe.open_steps(other).captions.committed() == []


class LaterSynthesize(FakeSynthesize):
    version = FakeSynthesize.version + 1


def test_images_of_an_earlier_version_are_kept_when_asked(config):
    recipe.build(config)
    before = contents(config)
    later = dataclasses.replace(config, synthesize=LaterSynthesize(model="fake"))
    with pytest.raises(MismatchError, match="accept_older=true uses it as it is, another output"):
        recipe.build(later)
    summary = recipe.build(dataclasses.replace(later, accept_older=True))
    assert [step.committed_now for step in summary.steps] == [0, 0, 0]
    assert contents(dataclasses.replace(later, accept_older=True)) == before
    other = LaterSynthesize(model="fake", steps=9)
    with pytest.raises(MismatchError, match="steps was 25 and is now 9") as caught:
        recipe.build(dataclasses.replace(later, synthesize=other, accept_older=True))
    assert "accept_older" not in str(caught.value)


def test_every_model_is_tried_before_anything_is_written(config):
    class Unusable(FakeEmbedding):
        def check(self):
            raise AttributeError("this tower has no patches")

    broken = Unusable(visual=config.embed.visual, text=config.embed.text)
    with pytest.raises(ModelError, match="this tower has no patches"):
        recipe.build(dataclasses.replace(config, embed=broken))
    assert not (Path(config.output) / "captions").exists()
    recipe.build(config)  # nothing is left to be tried once all shards are made
    assert recipe.build(dataclasses.replace(config, embed=broken)).collection is not None


def test_other_weights_under_the_same_name_are_noticed(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake").write_bytes(b"weights")
    with open(config.corpus.path, "a") as file:
        file.write("a broken cup\n")
    recipe.build(config)
    entries = json.loads((tmp_path / "out" / "models.json").read_text())
    assert {entry["step"] for entry in entries} == {"extract_nouns", "synthesize", "embed"}
    assert recipe.build(config).quarantined == 1
    (tmp_path / "fake").write_bytes(b"others")
    message = r"synthesize.model=fake has different weights than before"
    with pytest.raises(MismatchError, match=message):
        recipe.build(config)


def test_places_mean_the_same_from_another_folder(config, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake").write_bytes(b"weights of all fakes")
    first = dataclasses.replace(
        config, output="out", corpus=dataclasses.replace(config.corpus, path="captions.txt")
    )
    recipe.build(first)
    second = dataclasses.replace(
        first, output="second", images_from="out", collection="published",
        embed=FakeEmbedding(visual=config.embed.visual, text=TextEncoderConfig(model="another")),
    )  # fmt: skip
    recipe.build(second)
    ages = re.compile(r"\d+ s ago")
    here = ages.sub("", place_text("second"))
    monkeypatch.chdir(tmp_path / "sub")
    assert ages.sub("", place_text("../second")) == here
    assert verify("../second") == []
    show.draw_samples("../second", "samples.png")
    settings = json.loads((tmp_path / "second" / "build.json").read_text())
    assert settings["folder"] == str(tmp_path) and settings["images_from"] == str(tmp_path / "out")
    with ReferenceCollection.open(str(tmp_path / "published")) as collection:
        assert collection.visual_config.model == str(tmp_path / "fake")
        assert collection.text_config.model == "another"


def test_an_old_build_json_with_a_relative_place_is_refused_from_another_folder(
    config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe.build(config)
    old = tmp_path / "old"
    old.mkdir()
    (old / "build.json").write_text(json.dumps({"images_from": "out", "select_prompts": None}))
    assert "images come from" in place_text(str(old))
    monkeypatch.chdir(old)
    for ask in (place_text, verify):
        with pytest.raises(InputError, match="relative to the folder in which the build was start"):
            ask(str(old))


def test_the_manifest_says_what_the_collection_was_made_from(config, tmp_path):
    said = []
    first = recipe.build(config, said.append)
    assert any("licence of captions, fake is unknown" in line for line in said)
    with ReferenceCollection.open(first.collection_url) as collection:
        manifest = collection.manifest
    assert "captions: unknown" in manifest.licences and "fake: unknown" in manifest.licences
    (made_from,) = manifest.build["provenance"]
    assert made_from["corpus"]["corpus_id"] == "captions"
    assert {model["step"]: model["model"] for model in made_from["models"]} == {
        "extract_nouns": "miniature:tagger", "synthesize": "fake", "embed": "fake",
    }  # fmt: skip
    fields = made_from["steps"]["images"]["identity"]["stages"][0]["fields"]
    assert (fields["model"], fields["scheduler"], fields["steps"]) == ("fake", "dpm_solver++", 25)

    more = tmp_path / "more.txt"
    more.write_text("a pink cup\n")
    second = dataclasses.replace(
        config, output=str(tmp_path / "second"), base=first.collection_url,
        corpus=CorpusSpec(path=str(more), licence="CC0"), licences=("fake: MIT",),
    )  # fmt: skip
    said.clear()
    grown = recipe.build(second, said.append)
    assert not any("licence" in line for line in said)
    with ReferenceCollection.open(grown.collection_url) as collection:
        manifest = collection.manifest
    assert [p["corpus"]["corpus_id"] for p in manifest.build["provenance"]] == ["captions", "more"]
    assert {"captions: unknown", "more: CC0", "fake: MIT"} <= set(manifest.licences)
