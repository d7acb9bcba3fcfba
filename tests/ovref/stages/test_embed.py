import io
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump, parse
from ovref.contract import Dropped
from ovref.errors import ConfigError, ModelError
from ovref.identity import canonical, spec_identity
from ovref.ops.measures import MeasureSpec, SafetySpec, heat_entropy
from ovref.records import NO, UNSURE, YES, ImageRecord, Noun, Reference, Region
from ovref.run_shard import run_shard
from ovref.stages.embed import Embed, EmbedStage
from ovref.storage.file_store import Store
from ovref.storage.steps import open_step
from ovref_inference.collection.retrieve import class_embeddings, retrieval_embedding
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.pooling import pool_each

GRID = 4


def spec(**changes):
    fields = {
        "visual": VisualEncoderConfig(model="fake"),
        "text": TextEncoderConfig(model="fake"),
        "batch_size": 2,
    }
    return Embed(**(fields | changes))


class FakeVisual:
    """Features of a cell: its mean colour and its place. Remembers how it was called."""

    grid_hw = (GRID, GRID)

    def __init__(self, spoilt_cell=None):
        self.batches = []
        self.heatmaps = []
        self.spoilt_cell = spoilt_cell

    def encode_regions(self, images, masks, heatmaps=None):
        self.heatmaps.append(heatmaps)
        maps = self.encode(images)
        return [pool_each(f_hwd, m_nhw) for f_hwd, m_nhw in zip(maps, masks, strict=True)]

    def encode(self, images):
        self.batches.append(len(images))
        features = np.stack([self.one(image) for image in images])
        if self.spoilt_cell is not None:
            features[:, *self.spoilt_cell, 0] = np.nan
        return features

    def one(self, image):
        side = image.shape[0] // GRID
        colour = image.reshape(GRID, side, GRID, side, 3).mean(axis=(1, 3)) / 255
        place = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij"), axis=-1)
        return np.concatenate([colour, place], axis=-1).astype(np.float32)


class FakeTexts:
    """Each text's own direction, from its characters. Remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked.append(list(texts))
        rows = [np.random.default_rng(list(text.encode())).standard_normal(8) for text in texts]
        rows = np.stack(rows).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def jpeg(seed, size=16):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def region(noun="cat", box=(0, 0, 8, 8), size=16, value=YES):
    mask_hw = np.full((size, size), NO, np.uint8)
    mask_hw[box[1] : box[3], box[0] : box[2]] = value
    return Region(
        noun=Noun(text=noun, start=2, end=2 + len(noun)), mask_hw=mask_hw, score=0.5, source="daam"
    )


def record(key, regions, image=None, caption=None, heatmaps=None):
    return ImageRecord(
        key=key,
        caption=caption or f"a cat in {key}",
        source="test",
        image=image or jpeg(sum(key.encode())),
        regions=tuple(regions),
        heatmaps_nhw=heatmaps,
        seed=7,
    )


def embed(records, **changes):
    visual, texts = FakeVisual(changes.pop("spoilt_cell", None)), FakeTexts()
    stage = EmbedStage(spec(**changes), visual, texts)
    return list(stage(iter(records))), visual, texts


def test_templates_and_weights_are_those_of_the_specification():
    templates, weights = ("one {}", "two of {}"), (0.25, 0.75)
    (reference,), _, texts = embed([record("k", [region()])], templates=templates, weights=weights)
    assert texts.asked == [["a cat in k"], ["one cat", "two of cat"]]
    (caption,), (one, two) = FakeTexts().encode(texts.asked[0]), FakeTexts().encode(texts.asked[1])
    noun = (one + two) / np.linalg.norm(one + two)
    mixed = 0.25 * noun + 0.75 * caption
    np.testing.assert_allclose(reference.textual, mixed / np.linalg.norm(mixed), atol=1e-3)


def test_norms_are_kept_where_they_are_wanted():
    image = record("aa", [region("cat", (0, 0, 8, 4)), region("dog", (3, 5, 16, 16))])
    found, visual, _ = embed([image], norms=True)
    masks_nhw = np.stack([one.mask_hw for one in image.regions])
    ((raw_nd, _),) = visual.encode_regions([image.image_hwc()], [masks_nhw])
    norms = [reference.measures["norm"] for reference in found]
    np.testing.assert_allclose(norms, np.linalg.norm(raw_nd, axis=1), rtol=1e-6)
    assert embed([image])[0][0].measures == {} and "norms" not in canonical(spec())


def test_the_smallest_region_is_one_of_the_image_s_own_grid():
    kept = VisualEncoderConfig(model="fake", aspect="kept")
    visual = FakeVisual()
    visual.grid_of = lambda size_hw: (size_hw[0] // 8, size_hw[1] // 8)
    stage = EmbedStage(spec(visual=kept), visual, FakeTexts())
    # 16 x 16 pixels are four cells of 8 x 8: half a cell is 32 pixels.
    image = record("aa", [region("cat", (0, 0, 8, 4)), region("dog", (0, 0, 8, 3))])
    found = list(stage(iter([image])))
    assert {getattr(one, "reason", "kept") for one in found} == {"kept", "small_mask"}


def test_a_reference_equals_the_slow_computation():
    image = record("aa", [region("cat", (0, 0, 8, 4)), region("dog", (3, 5, 16, 16))])
    found, _, _ = embed([image])
    features = FakeVisual().one(image.image_hwc())
    for number, (reference, one) in enumerate(zip(found, image.regions, strict=True)):
        assert reference.key == f"aa#{number}"
        total, weight = np.zeros(5), 0
        for y, x in np.argwhere(one.mask_hw == YES):
            total += features[y // GRID, x // GRID]
            weight += 1
        pooled = total / weight
        np.testing.assert_allclose(reference.visual, pooled / np.linalg.norm(pooled), atol=1e-3)
        texts = FakeTexts()
        noun = class_embeddings(texts, [one.noun.text])[0]
        caption = texts.encode([image.caption])[0]
        np.testing.assert_allclose(reference.textual, retrieval_embedding(noun, caption), atol=1e-3)
        mixed = 0.9 * noun + 0.1 * caption
        np.testing.assert_allclose(reference.textual, mixed / np.linalg.norm(mixed), atol=1e-3)
        ys, xs = np.nonzero(one.mask_hw == YES)
        assert reference.box_xyxy == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert reference.area == len(ys) / 256
        assert (reference.noun, reference.caption) == (one.noun, image.caption)
        assert (reference.score, reference.source, reference.seed) == (0.5, "daam", 7)


def test_unsure_pixels_are_not_pooled():
    sure = region(box=(0, 0, 8, 8))
    mask_hw = sure.mask_hw.copy()
    mask_hw[mask_hw == NO] = UNSURE
    unsure = Region(noun=sure.noun, mask_hw=mask_hw, score=0.5, source="daam")
    found, _, _ = embed([record("aa", [sure, unsure])])
    np.testing.assert_array_equal(found[0].visual, found[1].visual)
    assert found[0].area == found[1].area == 0.25


def test_every_input_is_answered_in_order_whatever_is_wrong_with_it():
    records = [
        record("a0", [region(value=UNSURE), region(box=(0, 0, 1, 1)), region()]),
        record("a1", []),
        record("a2", [region()], image=b"no image at all"),
        record("a3", [region()], image=jpeg(0)[:200]),
        record("a4", [region(size=8)]),
        record("a5", [region(value=NO)]),
        record("a6", [region(box=(15, 15, 16, 16))]),
    ]
    found, _, _ = embed(records)
    drops = {drop.key: drop.reason for drop in found if isinstance(drop, Dropped)}
    assert drops == {
        "a0#0": "empty_mask",
        "a0#1": "small_mask",
        "a1": "no_regions",
        "a2": "corrupt_image",
        "a3": "truncated_image",
        "a4#0": "wrong_mask_size",
        "a5#0": "empty_mask",
        "a6#0": "small_mask",
    }
    assert [item.key for item in found if isinstance(item, Reference)] == ["a0#2"]


def test_a_region_of_one_pixel_is_a_reference_when_the_spec_allows_it():
    found, _, _ = embed([record("aa", [region(box=(15, 3, 16, 4))])], min_cells=0.0)
    assert found[0].box_xyxy == (15, 3, 16, 4)
    assert found[0].area == 1 / 256


def test_non_finite_features_drop_the_regions_that_touch_them():
    regions = [region(box=(0, 0, 8, 8)), region(box=(8, 8, 16, 16))]
    found, _, _ = embed([record("aa", regions)], spoilt_cell=(0, 0))
    assert found[0] == Dropped("aa#0", "nonfinite_features")
    assert np.isfinite(found[1].visual).all()


def test_features_without_a_direction_are_dropped():
    black = np.zeros((16, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(black).save(file, "PNG")
    found, _, _ = embed([record("aa", [region(box=(0, 0, 4, 4))], image=file.getvalue())])
    assert found == [Dropped("aa#0", "nonfinite_features")]


def test_the_background_is_what_shows_the_noun_nowhere():
    left, right = region("cat", (0, 0, 4, 16)), region("cat", (12, 0, 16, 16), value=UNSURE)
    dog = region("dog", (4, 0, 8, 16))
    image = record("aa", [left, right, dog])
    found, _, _ = embed([image], part="background")
    cells = FakeVisual().one(image.image_hwc())
    for number, columns in ((0, [1, 2]), (1, [1, 2]), (2, [0, 2, 3])):
        reference = found[number]
        expected = cells[:, columns].mean((0, 1))
        np.testing.assert_allclose(reference.visual, expected / np.linalg.norm(expected), atol=1e-3)
        assert reference.key == f"aa#{number}" and reference.noun == image.regions[number].noun
    assert found[0].area == 0.5 and found[0].box_xyxy == (4, 0, 12, 16)


def test_where_the_noun_is_everywhere_or_nowhere_there_is_no_background():
    full, empty = region(box=(0, 0, 16, 16)), region(value=NO)
    found, _, _ = embed([record("aa", [full]), record("bb", [empty])], part="background")
    assert found == [Dropped("aa#0", "no_background"), Dropped("bb#0", "empty_mask")]


def test_heatmap_crops_get_the_heatmaps_of_the_regions_that_are_embedded():
    visual = VisualEncoderConfig(model="fake", library="open_clip", features="crop_heatmap")
    heatmaps = np.stack([np.full((4, 4), value, np.float16) for value in (0.25, 0.5, 0.75)])
    whole = record("aa", [region(), region(value=NO), region("dog")], heatmaps=heatmaps)
    found, fake, _ = embed([whole, record("bb", [region()])], visual=visual)
    assert found[1] == Dropped("aa#1", "empty_mask")
    assert found[3] == Dropped("bb#0", "no_heatmap")
    ((first, second),) = fake.heatmaps
    assert first.shape == (2, 16, 16) and second.shape == (0, 16, 16)
    np.testing.assert_allclose(first[0], 0.25, atol=1e-6)
    np.testing.assert_allclose(first[1], 0.75, atol=1e-6)


def test_the_default_part_leaves_the_identity_as_it_was():
    assert "part" not in spec_identity(spec())["fields"]
    assert spec_identity(spec(part="background"))["fields"]["part"] == "background"


def test_results_do_not_depend_on_the_batch_size():
    records = [record(f"a{i}", [region(), region("dog", (4, 4, 16, 16))]) for i in range(5)]
    one, _, _ = embed(records, batch_size=1)
    four, visual, _ = embed(records, batch_size=4)
    assert visual.batches == [4, 1]
    assert [item.key for item in one] == [item.key for item in four]
    for a, b in zip(one, four, strict=True):
        np.testing.assert_allclose(a.visual, b.visual, atol=1e-3)
        np.testing.assert_allclose(a.textual, b.textual, atol=1e-3)


def test_what_the_encoders_see_of_a_shard_does_not_depend_on_earlier_shards():
    shard = [record(f"a{i}", [region("cat"), region("dog")]) for i in range(3)]
    before = [record("b0", [region("dog"), region("owl")])]
    _, fresh, fresh_texts = embed(shard)

    visual, texts = FakeVisual(), FakeTexts()
    stage = EmbedStage(spec(), visual, texts)
    list(stage(iter(before)))
    visual.batches.clear()
    texts.asked.clear()
    list(stage(iter(shard)))

    def captions(asked):
        return [texts for texts in asked if texts[0].startswith("a cat in")]

    assert visual.batches == fresh.batches == [2, 1]
    assert captions(texts.asked) == captions(fresh_texts.asked)
    # Each noun is encoded in a call of its own, once.
    nouns = [asked for asked in fresh_texts.asked if asked not in captions(fresh_texts.asked)]
    assert [len(asked) for asked in nouns] == [7, 7]
    assert len([asked for asked in texts.asked if "owl" in asked[0] or "dog" in asked[0]]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ()}, "templates"),
        ({"templates": ("a photo",)}, "templates"),
        ({"weights": (0.0, 0.0)}, "weights"),
        ({"weights": (-1.0, 2.0)}, "weights"),
        ({"min_cells": -1.0}, "min_cells"),
        ({"batch_size": 0}, "batch_size"),
        (
            {
                "part": "background",
                "visual": VisualEncoderConfig(
                    model="fake", library="open_clip", features="crop_heatmap"
                ),
            },
            "the background has no heatmap",
        ),
    ],
)
def test_values_out_of_range_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_the_spec_survives_pickle_and_yaml_and_refuses_unknown_keys():
    assert pickle.loads(pickle.dumps(spec())) == spec()
    assert parse(Embed, dump(spec())) == spec()
    with pytest.raises(ConfigError, match="unknown key template"):
        parse(Embed, dump(spec()) | {"template": "a {}"})


def test_the_module_is_importable_without_torch():
    code = "import sys, ovref.stages.embed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_cannot_be_loaded_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="nothing_here"):
        spec(visual=VisualEncoderConfig(model=str(tmp_path / "nothing_here"))).build()


@pytest.mark.parametrize(
    "visual",
    [
        VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64)),
        VisualEncoderConfig(
            model="miniature:clip", library="open_clip", size_hw=(64, 64), features="crop_heatmap"
        ),
    ],
)
def test_real_encoders_and_storage(tmp_path, visual):
    """The miniature's encoders, through `run_shard`, in batches of 1 and of 4."""
    records = [
        record(
            f"a{i}",
            [region("cat", (0, 0, 32, 20), size=64), region("dog", (4, 4, 60, 60), size=64)],
            image=jpeg(i, 64),
            heatmaps=np.random.default_rng(i).random((2, 16, 16)).astype(np.float16),
        )
        for i in range(5)
    ]
    place = Store.open(str(tmp_path))
    images = open_step(place, "images", {})
    images.commit("00000", records, inputs=5)
    found = {}
    for batch_size in (1, 4):
        embed_spec = spec(
            visual=visual, text=TextEncoderConfig(model="miniature:clip"), batch_size=batch_size
        )
        identity = {"stages": [spec_identity(embed_spec)]}
        target = open_step(place, f"references_{'x' * batch_size}", identity, [images.fingerprint])
        commit = run_shard([embed_spec.build()], images, target, "00000")
        assert (commit.inputs, commit.outputs, commit.dropped_parts) == (5, 10, {})
        found[batch_size] = list(target.read("00000"))
    for one, four in zip(found[1], found[4], strict=True):
        assert (one.key, one.noun) == (four.key, four.noun)
        assert np.linalg.norm(one.visual.astype(float)) == pytest.approx(1, abs=2e-3)
        np.testing.assert_allclose(one.visual, four.visual, atol=2e-3)
        np.testing.assert_allclose(one.textual, four.textual, atol=2e-3)


def test_a_batch_is_embedded_while_the_one_before_is_written():
    """Undecodable images do not fill a batch, although others are decoded ahead of it."""
    visual = FakeVisual()
    stage = EmbedStage(spec(), visual, FakeTexts())
    second = threading.Event()
    encode = visual.encode_regions

    def noted(images, masks, heatmaps=None):
        if visual.batches:
            second.set()
        return encode(images, masks, heatmaps)

    visual.encode_regions = noted
    records = [record(f"k{n}", [region()]) for n in range(6)]
    records.insert(1, record("bad", [region()], image=b"no image"))
    out = stage(iter(records))
    answers = [next(out) for _ in range(2)]
    assert second.wait(20)  # nobody has asked for the second batch yet
    answers += list(out)
    assert [answer.key for answer in answers if isinstance(answer, Reference)] == [
        f"k{n}#0" for n in range(6)
    ]
    assert visual.batches == [2, 2, 2]


def test_an_error_of_an_encoder_reaches_whoever_takes_the_references():
    class Broken(FakeVisual):
        def encode_regions(self, images, masks, heatmaps=None):
            if self.batches:
                raise ModelError("no more")
            return super().encode_regions(images, masks, heatmaps)

    found = []
    with pytest.raises(ModelError, match="no more"):
        for reference in EmbedStage(spec(), Broken(), FakeTexts())(
            iter([record(f"k{n}", [region()]) for n in range(6)])
        ):
            found.append(reference.key)
    assert found == ["k0#0", "k1#0"]


class Eyes(FakeTexts):
    """Sees in a crop a text that its size and first pixel give."""

    def encode_images(self, images):
        return self.encode([f"{image_hwc.shape} {image_hwc[0, 0]}" for image_hwc in images])


def test_measures_of_each_region_that_is_embedded():
    two_parts = region("dog", box=(0, 0, 4, 8))
    two_parts.mask_hw[8:, 8:] = YES
    regions = [region("cat"), region("cup", box=(0, 0, 1, 1)), two_parts]
    heatmaps = np.random.default_rng(0).random((3, 4, 4)).astype(np.float16)
    records = [record("a", regions, heatmaps=heatmaps), record("b", [region("dog")])]
    measured = spec(measures=MeasureSpec(safety=SafetySpec(model="fake")))
    texts = Eyes()
    stage = EmbedStage(measured, FakeVisual(), texts, lambda images: [0.1 * i for i in range(2)])
    answers = list(stage(iter(records)))
    found = {one.key: one.measures for one in answers if isinstance(one, Reference)}
    assert list(found) == ["a#0", "a#2", "b#0"]  # the cup is too small
    assert [found[key]["components"] for key in found] == [1, 2, 1]
    assert [found[key]["unsafe"] for key in found] == [0, 0, 0.1]
    assert found["a#2"]["entropy"] == heat_entropy(heatmaps[2])
    assert np.isnan(found["b#0"]["entropy"])
    crop_hwc = records[0].image_hwc()[0:16, 0:16]  # the box of the dog's mask
    eyes = Eyes().encode_images([crop_hwc])[0]
    dog = class_embeddings(FakeTexts(), ["dog"], measured.templates)[0]
    assert found["a#2"]["clip"] == pytest.approx(float(eyes @ dog))
    plain, _, _ = embed(records)
    assert all(not one.measures for one in plain if isinstance(one, Reference))
    assert spec_identity(spec()) == spec_identity(spec(measures=None))
    assert "measures" not in spec_identity(spec())["fields"]
