"""The ground stage: accounting, upright images, regions; with finders that are written down."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump, parse
from ovref.contract import Dropped
from ovref.errors import ConfigError, ModelError
from ovref.identity import record_key
from ovref.models.noun_grounding import DetectorRoute, Finder, GroundedNoun, ProposalRoute
from ovref.records import YES, ImageRecord, Noun, Prompt
from ovref.stages.ground import Ground, GroundStage
from ovref.storage.codec import decode, encode
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.proposers.config import (
    GroundingDinoConfig,
    MaskFormerConfig,
    OpenCutProposerConfig,
    ProposerConfig,
    SamConfig,
    SamGridConfig,
)

DETECTOR = DetectorRoute(detector=GroundingDinoConfig(model="none"), sam=SamConfig(model="none"))


def spec(**changes):
    return Ground(**{"detector": DETECTOR, "batch_size": 2, **changes})


def picture(size_hw=(20, 30), orientation=None, kind="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, kind, exif=exif)
    return file.getvalue()


def prompt(caption, *nouns, image=None, key=None):
    found, after = [], {}
    for noun in nouns:
        start = caption.index(noun, after.get(noun, 0))
        after[noun] = start + len(noun)
        found.append(Noun(text=noun, start=start, end=start + len(noun)))
    return Prompt(
        key=key or record_key("test", caption),
        caption=caption,
        nouns=tuple(found),
        source="test:1",
        image=picture() if image is None else image,
    )


class Written:
    """A finder that draws each noun's masks from a dict: noun -> fractions of the image."""

    def __init__(self, masks, heatmaps=False):
        self.masks, self.heatmaps, self.calls = masks, heatmaps, []

    def __call__(self, images, nouns):
        self.calls.append((len(images), [list(n) for n in nouns]))
        for image_hwc, texts in zip(images, nouns, strict=True):
            yield [
                self._found(number, share, image_hwc.shape[:2])
                for number, text in enumerate(texts)
                for share in self.masks.get(text, ())
            ]

    def _found(self, number, share, size_hw):
        mask_hw = np.zeros(size_hw, dtype=bool)
        mask_hw.reshape(-1)[: round(share * mask_hw.size)] = True
        heatmap = mask_hw.astype(np.float32) if self.heatmaps else None
        facts = {"predicted_iou": share}
        return GroundedNoun(
            noun=number, mask_hw=mask_hw, score=share, facts=facts, heatmap_hw=heatmap
        )


def run(find, prompts, **changes):
    finder = Finder(find, source="grounded_sam", missing="no_box", provenance={"detector": "none"})
    items = list(GroundStage(spec(**changes), finder)(iter(prompts)))
    drops = {(item.key, item.reason) for item in items if isinstance(item, Dropped)}
    return [item for item in items if isinstance(item, ImageRecord)], drops


def test_each_noun_gets_its_regions_and_what_has_none_is_dropped():
    find = Written({"cat": (0.5, 0.25), "dog": (0.1,), "flea": (0.0001,), "sky": (1.0,)})
    asked = prompt("a cat, a dog, a flea, a sky and a cow", "cat", "dog", "flea", "sky", "cow")
    records, drops = run(find, [asked])
    record = records[0]
    assert [region.noun.text for region in record.regions] == ["cat", "cat", "dog"]
    assert [region.score for region in record.regions] == [0.5, 0.25, 0.1]
    assert {region.source for region in record.regions} == {"grounded_sam"}
    assert all(region.mask_hw.shape == (20, 30) for region in record.regions)
    assert set(np.unique(record.regions[0].mask_hw)) == {0, 255}
    assert (record.regions[0].mask_hw == 255).mean() == 0.5
    assert drops == {
        (f"{asked.key}#2", "empty_mask"),
        (f"{asked.key}#3", "full_mask"),
        (f"{asked.key}#4", "no_box"),
    }
    facts = [{"predicted_iou": share} for share in (0.5, 0.25, 0.1)]
    assert record.provenance == {"detector": "none", "regions": facts}
    assert record.key == asked.key and record.caption == asked.caption and record.seed is None
    assert record.heatmaps_nhw is None


def test_records_survive_the_codec():
    find = Written({"cat": (0.5, 0.25)}, heatmaps=True)
    record = run(find, [prompt("a cat", "cat")])[0][0]
    again = decode(record.key, encode(record))
    assert again.provenance == record.provenance and again.image == record.image
    for ours, theirs in zip(record.regions, again.regions, strict=True):
        np.testing.assert_array_equal(ours.mask_hw, theirs.mask_hw)
    assert record.heatmaps_nhw.shape == (2, 5, 8) and record.heatmaps_nhw.dtype == np.float16
    np.testing.assert_array_equal(again.heatmaps_nhw, record.heatmaps_nhw)


def test_a_noun_said_twice_is_looked_for_once_under_its_first_mention():
    find = Written({"cat": (0.5,)})
    asked = prompt("a cat and a cow and a cat and a cow", "cat", "cow", "cat", "cow")
    records, drops = run(find, [asked])
    assert find.calls == [(1, [["cat", "cow"]])]
    assert [region.noun for region in records[0].regions] == [asked.nouns[0]]
    assert drops == {(f"{asked.key}#1", "no_box")}


def test_prompts_that_cannot_be_grounded_are_dropped_with_their_reason():
    whole = picture()
    prompts = [
        Prompt(key="bare", caption="a cat", nouns=(Noun(text="cat", start=2, end=5),), source="s"),
        prompt("no nouns at all", key="nouns"),
        prompt("a cat", "cat", image=b"", key="empty"),
        prompt("a cat", "cat", image=b"no image", key="corrupt"),
        prompt("a cat", "cat", image=whole[: len(whole) // 2], key="truncated"),
        prompt("a cow", "cow", key="unfound"),
        prompt("a cat", "cat", key="fine"),
    ]
    records, drops = run(Written({"cat": (0.5,)}), prompts)
    assert [record.key for record in records] == ["fine"]
    assert drops == {
        ("bare", "no_image"),
        ("nouns", "no_nouns"),
        ("empty", "empty_image"),
        ("corrupt", "corrupt_image"),
        ("truncated", "truncated_image"),
        ("unfound#0", "no_box"),
        ("unfound", "no_regions"),
    }


def test_a_turned_image_is_kept_upright_and_masks_are_of_that():
    turned = prompt("a cat", "cat", image=picture((20, 30), orientation=6, kind="JPEG"))
    record = run(Written({"cat": (0.5,)}), [turned])[0][0]
    assert record.regions[0].mask_hw.shape == (30, 20)
    with Image.open(io.BytesIO(record.image)) as image:
        assert image.size == (20, 30) and 0x0112 not in image.getexif()
    assert record.image_hwc().shape == (30, 20, 3)


def test_images_are_found_in_batches_and_answered_in_order():
    find = Written({"cat": (0.5,)})
    prompts = [prompt(f"a cat {number}", "cat", key=f"k{number}") for number in range(5)]
    records, drops = run(find, prompts)
    assert [size for size, _ in find.calls] == [2, 2, 1]
    assert [record.key for record in records] == [asked.key for asked in prompts] and not drops


PROPOSALS = ProposalRoute(
    proposer=ProposerConfig(mask_former=MaskFormerConfig(model="none")),
    visual=VisualEncoderConfig(model="none", library="open_clip", features="crop_binary"),
    text=TextEncoderConfig(model="none"),
)


@pytest.mark.parametrize("route", [{"detector": DETECTOR}, {"proposals": PROPOSALS}])
def test_the_spec_is_data(route):
    ground = Ground(**route)
    assert pickle.loads(pickle.dumps(ground)) == ground
    assert parse(Ground, dump(ground)) == ground


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name one route"),
        ({"detector": DETECTOR, "proposals": PROPOSALS}, "name one route"),
        ({"detector": DETECTOR, "batch_size": 0}, "batch_size"),
        ({"detector": DETECTOR, "min_area": 0.9, "max_area": 0.1}, "ordered"),
    ],
)
def test_specs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Ground(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": ("a photo",)}, "templates"),
        ({"min_similarity": 2.0}, "min_similarity"),
        ({"visual": VisualEncoderConfig(model="m")}, "open_clip"),
        (
            {
                "visual": VisualEncoderConfig(
                    model="m", library="open_clip", features="crop_heatmap"
                ),
                "proposer": ProposerConfig(sam_grid=SamGridConfig(sam=SamConfig(model="m"))),
            },
            "only mask_former",
        ),
    ],
)
def test_routes_that_make_no_sense_are_refused(fields, message):
    plain = {name: getattr(PROPOSALS, name) for name in ("proposer", "visual", "text")}
    with pytest.raises(ValueError, match=message):
        ProposalRoute(**{**plain, **fields})


def test_exactly_one_proposer_is_named():
    keys = OpenCutProposerConfig(keys=VisualEncoderConfig(model="m", features="keys"))
    assert ProposerConfig(opencut=keys).name == "opencut"
    with pytest.raises(ValueError, match="found none"):
        ProposerConfig()
    with pytest.raises(ValueError, match="mask_former and opencut"):
        ProposerConfig(opencut=keys, mask_former=MaskFormerConfig(model="m"))


def test_unknown_settings_are_refused():
    tree = dump(Ground(detector=DETECTOR))
    tree["detector"]["sam"]["multi_mask"] = True
    with pytest.raises(ConfigError, match="multi_mask"):
        parse(Ground, tree)


@pytest.mark.parametrize("route", [{"detector": DETECTOR}, {"proposals": PROPOSALS}])
def test_a_model_that_is_not_there_fails_the_build(route, tmp_path):
    missing = str(tmp_path / "missing")
    text = json.dumps(dump(Ground(**route))).replace('"none"', json.dumps(missing))
    with pytest.raises(ModelError, match="missing"):
        parse(Ground, json.loads(text)).build()


def scene_prompts(count):
    from ovref.miniature.scenes import render

    for seed in range(count):
        scene, file = render(seed, "test"), io.BytesIO()
        Image.fromarray(scene.image_hwc).save(file, "JPEG", quality=95)
        yield Prompt(
            key=record_key("scenes", str(seed)),
            caption=scene.caption,
            nouns=tuple(Noun(text=n.lemma, start=n.start, end=n.end) for n in scene.nouns),
            source=f"scene {seed}",
            image=file.getvalue(),
        )


def check_answers(prompts, items):
    """Every prompt is answered; records hold what the route found and can be stored."""
    records = [item for item in items if isinstance(item, ImageRecord)]
    dropped = {item.key for item in items if isinstance(item, Dropped)}
    assert {record.key for record in records} | dropped >= {asked.key for asked in prompts}
    assert records
    for record in records:
        assert len(record.provenance["regions"]) == len(record.regions)
        assert all(region.mask_hw.shape == (64, 64) for region in record.regions)
        again = decode(record.key, encode(record))
        assert again.provenance == record.provenance and len(again.regions) == len(record.regions)
    return records


def test_the_detector_route_finds_what_scenes_show():
    from ovref.miniature.scenes import render
    from ovref.miniature.shapes import CLASSES

    # Lower than the published thresholds: the miniature is less sure of itself.
    detector = GroundingDinoConfig(
        model="miniature:grounding_dino", box_threshold=0.2, text_threshold=0.2
    )
    route = DetectorRoute(detector=detector, sam=SamConfig(model="miniature:sam"))
    prompts = list(scene_prompts(8))
    stage = Ground(detector=route, batch_size=4).build()
    found = {}
    for record in check_answers(prompts, list(stage(iter(prompts)))):
        assert record.provenance["sam"] == "miniature:sam"
        for region, facts in zip(record.regions, record.provenance["regions"], strict=True):
            assert region.source == "grounded_sam" and 0.2 < region.score <= 1
            left, top, right, bottom = facts["box_xyxy"]
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            assert 0 < facts["predicted_iou"] < 1.2
            mask_hw = found.setdefault((record.key, region.noun.text), np.zeros((64, 64), bool))
            mask_hw |= region.mask_hw == YES
    ious = []
    for seed, asked in enumerate(prompts):
        label_hw = render(seed, "test").label_hw
        for name in {noun.text for noun in asked.nouns}:
            truth_hw = label_hw == CLASSES.index(name)
            mask_hw = found.get((asked.key, name), np.zeros((64, 64), bool))
            ious.append((truth_hw & mask_hw).sum() / (truth_hw | mask_hw).sum())
    assert np.mean(np.array(ious) > 0.6) >= 0.8


GRID = SamGridConfig(
    sam=SamConfig(model="miniature:sam"),
    points_per_side=4,
    min_predicted_iou=0.5,
    min_stability=0.5,
)
PROPOSERS = {
    "sam_grid": (ProposerConfig(sam_grid=GRID), "crop_binary"),
    "mask_former": (
        ProposerConfig(mask_former=MaskFormerConfig(model="miniature:maskformer")),
        "crop_heatmap",
    ),
}


@pytest.mark.parametrize("name", PROPOSERS)
def test_the_proposal_route_from_files_to_records(name):
    proposer, features = PROPOSERS[name]
    route = ProposalRoute(
        proposer=proposer,
        visual=VisualEncoderConfig(
            model="miniature:clip", library="open_clip", features=features, size_hw=(64, 64)
        ),
        text=TextEncoderConfig(model="miniature:clip"),
    )
    prompts = list(scene_prompts(3))
    stage = Ground(proposals=route, batch_size=2).build()
    for record in check_answers(prompts, list(stage(iter(prompts)))):
        assert {region.source for region in record.regions} == {f"{name}_clip"}
        assert all(-1 <= region.score <= 1 for region in record.regions)
        assert record.provenance["features"] == features
        if name == "mask_former":
            assert record.heatmaps_nhw.shape == (len(record.regions), 16, 16)
            for region, heatmap_hw in zip(record.regions, record.heatmaps_nhw, strict=True):
                inside = region.mask_hw[2::4, 2::4] == YES
                assert not inside.any() or heatmap_hw[inside].mean() > 0.5
        else:
            assert record.heatmaps_nhw is None
