"""The evaluation end to end on a small collection, and against the segmenters people use."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump, parse
from ovref.errors import ConfigError, InputError
from ovref.evaluation import cached
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.datasets import LabelFolder
from ovref.evaluation.evaluate import (
    EvaluateSpec,
    evaluate,
    make_bench,
)
from ovref.evaluation.miniature import OPENCUT
from ovref.evaluation.oracle import label_masks, oracle_proposer
from ovref.evaluation.report import markdown, text
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import load_text_encoder, load_visual_encoder
from ovref_inference.errors import CollectionError
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.load import load_proposer, no_proposals
from ovref_inference.proposers.opencut import OpenCutConfig
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
from ovref_inference.segmenters.windows import WindowConfig


@pytest.fixture(scope="module")
def spec(collection_url, tmp_path_factory):
    return EvaluateSpec(
        collection=collection_url,
        output=str(tmp_path_factory.mktemp("evaluation") / "new" / "folder"),
        split="validation",
        scenes=5,
        fossil=FossilConfig(n=6, k=2, windows=None),
        opencut=replace(OPENCUT, cut=OpenCutConfig(taus=(0.2, 0.8), stages=2)),
        ablate_n=(2, 6),
        ablate_k=(1, 2),
        ablate_gamma=(0.0, 1.0),
        pictures=2,
    )


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def result(spec, lines):
    return evaluate(spec, lines.append, device="cpu")


@pytest.fixture(scope="module")
def bench(spec, collection_url):
    with CachedModels(device="cpu") as models:
        collection = models.collection(collection_url)
        yield make_bench(spec, collection, models, lambda line: None)


def test_all_rows_and_ablations_are_there_with_fractions(result):
    names = [row["name"] for row in result["rows"]]
    assert names == [
        "FOSSIL",
        "FOSSIL without proposals",
        "FOSSIL with oracle masks",
        "text only",
        "text only with OpenCut",
        "text only with oracle masks",
    ]
    assert {name: len(rows) for name, rows in result["ablations"].items()} == {
        "n": 2,
        "k": 2,
        "gamma": 2,
    }
    for row in itertools.chain(result["rows"], *result["ablations"].values()):
        assert 0 <= row["miou"] <= 1 and 0 <= row["pixel_accuracy"] <= 1


def test_every_row_is_of_the_masks_that_it_names(result, bench, spec):
    expected = [bench.fossil(spec.fossil, name) for name in ("opencut", "none", "oracle")]
    expected += [bench.text_only(name) for name in ("none", "opencut", "oracle")]
    mious = [row["miou"] for row in result["rows"]]
    assert mious == [round(bench.scores(bench.predict(one)).miou, 4) for one in expected]
    assert len(set(mious)) == 6
    assert result["ratios"] == {
        "over_text_only": pytest.approx(mious[0] / max(mious[3:5]), abs=0.01),
        "over_oracle": pytest.approx(mious[0] / mious[2], abs=0.01),
    }


def test_an_ablation_at_the_best_value_repeats_the_main_row(result):
    for name in ("n", "k"):
        assert result["ablations"][name][1]["miou"] == result["rows"][0]["miou"]


def test_results_say_what_they_are_of(result, spec):
    assert "miniature" in result["caption"] and "nothing about the real models" in result["caption"]
    assert result["spec"] == dump(spec)
    assert result["collection"]["references"] > 0 and result["class_fingerprint"]
    assert set(result["support"].values()) == {"own references"}
    some = result | {"support": {"pipette": "none (nearest: fish at cosine 0.93)"}}
    assert "own: pipette: none (nearest: fish" in text(some)


def test_files_are_written_and_agree(result, spec, lines):
    folder = spec.output
    with open(f"{folder}/evaluation.json") as file:
        assert json.load(file) == result
    with open(f"{folder}/evaluation.md") as file:
        page = file.read()
    assert page == markdown(result)
    assert result["caption"] in page and "| FOSSIL with oracle masks |" in page
    with Image.open(f"{folder}/predictions.png") as picture:
        assert picture.format == "PNG"
    assert lines[-1] == text(result)


def test_ablations_that_nobody_asked_for_have_no_table(result):
    without = result | {"ablations": result["ablations"] | {"k": []}}
    assert "FOSSIL, K" in markdown(result) and "FOSSIL, K" not in markdown(without)
    assert "FOSSIL, K" in text(result) and "FOSSIL, K" not in text(without)


def test_bounds_of_zero_have_no_ratio(result):
    without = result | {"ratios": {}}
    for page in (markdown(without), text(without)):
        assert "mIoU is ." not in page and "no ratio to its bounds" in page


def test_a_collection_of_masked_crops_is_refused(spec):
    crops = VisualEncoderConfig(
        model="miniature:clip", library="open_clip", features="crop_binary", size_hw=(64, 64)
    )
    with pytest.raises(InputError, match=r"masked crops \(crop_binary\)"):
        make_bench(spec, SimpleNamespace(visual_config=crops), CachedModels(), print)


def test_the_table_is_aligned(result):
    lines = [line for line in text(result).splitlines() if line.startswith(("method", "FOSSIL "))]
    main = [line for line in lines if "mIoU %" not in line and not line.endswith(".")][:3]
    assert len({len(line) for line in main}) == 1


def test_cached_models_give_what_the_segmenters_give(bench, spec, embed):
    visual, clip = load_visual_encoder(embed.visual), load_visual_encoder(spec.clip)
    texts = load_text_encoder(embed.text)
    masks = [label_masks(label_hw) for label_hw in bench.data.labels]
    proposers = {
        "none": no_proposals,
        "opencut": load_proposer(ProposerConfig(opencut=spec.opencut)),
        "oracle": oracle_proposer(bench.data.images, masks),
    }
    for name, proposer in proposers.items():
        fossil = FossilSegmenter(bench.collection, visual, texts, proposer, spec.fossil)
        text_only = TextOnlySegmenter(clip, texts, proposer, windows=None)
        for plain, over_cache in (
            (fossil, bench.fossil(spec.fossil, name)),
            (text_only, bench.text_only(name)),
        ):
            results = plain.segment(bench.data.images, bench.data.classes)
            for found, label_hw in zip(results, bench.predict(over_cache), strict=True):
                np.testing.assert_array_equal(found.labels_hw, label_hw)


def test_models_run_once_for_all_rows_and_ablations(spec, monkeypatch, tmp_path):
    """Each encoder sees each image once, although some twelve rows are measured."""
    seen = []

    def counted(config, device=None):
        encoder = load_visual_encoder(config, device=device)
        encode = encoder.encode
        encoder.encode = lambda images: seen.append(len(images)) or encode(images)
        return encoder

    monkeypatch.setattr(cached, "load_region_encoder", counted)
    evaluate(replace(spec, output=str(tmp_path), pictures=0), lambda line: None, device="cpu")
    assert seen == [5, 5]


@pytest.fixture
def folder(tmp_path, bench):
    """Two of the bench's scenes as files, one of them cut to another size."""
    (tmp_path / "classes.txt").write_text("\n".join(bench.data.classes))
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for index, rows in enumerate((64, 40)):
            Image.fromarray(getattr(bench.data, kind)[index][:rows]).save(
                tmp_path / kind / f"{index}.png"
            )
    return LabelFolder(
        images=str(tmp_path / "images"),
        labels=str(tmp_path / "labels"),
        classes=str(tmp_path / "classes.txt"),
        unseen=bench.data.classes[::2],
    )


def test_a_label_folder_is_evaluated_like_scenes(spec, folder, tmp_path):
    spec = replace(
        spec, folder=folder, output=str(tmp_path / "out"), ablate_n=(6,), ablate_k=(2,), pictures=1
    )
    lines = []
    found = evaluate(spec, lines.append, device="cpu")
    assert found["data"] == "images, 2 images" and found["spec"]["folder"]["first_label"] == 0
    assert "know nothing of others" in found["caption"] and "miniature:dinov2" in found["caption"]
    assert all(0 <= row["hiou"] <= 1 for row in found["rows"]) and "hIoU %" in lines[-1]
    # The first image is a scene that the bench has too.
    one = evaluate(replace(spec, folder=replace(folder, limit=1)), lines.append, device="cpu")
    scene = evaluate(replace(spec, folder=None, scenes=1), lines.append, device="cpu")
    for row, same in zip(one["rows"], scene["rows"], strict=True):
        assert row["miou"] == same["miou"] and "hiou" not in same


def test_a_named_set_scores_what_the_same_files_score_as_a_folder(spec, bench, tmp_path):
    voc = tmp_path / "VOC2010"
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (voc / folder).mkdir(parents=True)
    for index in range(2):
        # Without loss, so that the pixels are those of the scenes; decoders go by the content.
        Image.fromarray(bench.data.images[index]).save(voc / f"JPEGImages/{index}.jpg", "PNG")
        Image.fromarray(bench.data.labels[index]).save(
            voc / f"SegmentationClassContext/{index}.png"
        )
    (voc / "ImageSets/SegmentationContext/val.txt").write_text("0\n1\n")
    names = [*bench.data.classes, *(f"nothing {n}" for n in range(60 - len(bench.data.classes)))]
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(names))
    folder = LabelFolder(
        images=str(voc / "JPEGImages"),
        labels=str(voc / "SegmentationClassContext"),
        classes=str(classes),
    )
    spec = replace(spec, output=str(tmp_path / "out"), ablate_n=(6,), ablate_k=(2,), pictures=0)
    named = replace(spec, dataset="context60", root=str(tmp_path), names=str(classes))
    found = evaluate(named, lambda line: None, device="cpu")
    same = evaluate(replace(spec, folder=folder), lambda line: None, device="cpu")
    assert found["rows"] == same["rows"] and found["data"] == "context60 val, 2 of 5104 images"
    assert "know nothing of others" in found["caption"] and "Pascal Context" in found["convention"]


def test_a_named_set_needs_its_root_and_no_folder(spec, folder):
    for wrong in ({"dataset": "voc21"}, {"root": "/data"}):
        with pytest.raises(ValueError, match="give dataset with root, or folder, or neither"):
            replace(spec, **wrong)
    with pytest.raises(ValueError, match="give dataset with root, or folder, or neither"):
        replace(spec, dataset="voc21", root="/data", folder=folder)


def test_a_specification_comes_from_plain_values_and_refuses_mistakes(spec):
    assert parse(EvaluateSpec, dump(spec)) == spec
    with pytest.raises(ConfigError, match="unknown key scene"):
        parse(EvaluateSpec, {"collection": "x", "output": "y", "scene": 3})
    with pytest.raises(ConfigError, match="scenes must be at least 1"):
        parse(EvaluateSpec, {"collection": "x", "output": "y", "scenes": 0})
    with pytest.raises(ValueError, match="pictures"):
        replace(spec, pictures=-1)
    with pytest.raises(ValueError, match="split must be one of"):
        replace(spec, split="train")
    with pytest.raises(ValueError, match="windows would slide twice"):
        replace(spec, fossil=FossilConfig(), protocol="tcl")
    with pytest.raises(ConfigError, match="no protocol 'tlc'"):
        replace(spec, protocol="tlc")


def test_windows_of_the_bench_are_those_that_a_segmenter_slides_itself(spec, collection_url):
    windows = WindowConfig(short_side=64, long_side=200, crop=48, stride=16)
    config = replace(spec.fossil, windows=windows)
    with CachedModels(device="cpu") as models:
        collection = models.collection(collection_url)
        bench = make_bench(
            replace(spec, fossil=config, scenes=2), collection, models, lambda line: None
        )
        whole = make_bench(replace(spec, scenes=2), collection, models, lambda line: None)
        found = bench.predict(bench.fossil(config, "opencut"))
        own = FossilSegmenter(
            collection, bench.visual, bench.text, bench.proposers["opencut"], config
        )
        expected = [one.labels_hw for one in own.segment(bench.data.images, bench.data.classes)]
        # Rounding differs, where two classes are nearly equal.
        agree = [np.mean(a == b) for a, b in zip(found, expected, strict=True)]
        assert min(agree) > 0.999
        different = [
            np.mean(a == b)
            for a, b in zip(found, whole.predict(whole.fossil(config, "opencut")), strict=True)
        ]
        assert max(different) < 0.999
        oracle = bench.scores(bench.predict(bench.fossil(config, "oracle")))
        assert oracle.pixel_accuracy > 0.5
    assert "windows of 48 at stride 16" in bench.protocol.described()


def test_a_collection_that_is_not_there_is_a_clear_error(spec, tmp_path):
    with pytest.raises(CollectionError, match="nowhere"):
        evaluate(replace(spec, collection=str(tmp_path / "nowhere")), lambda line: None)
