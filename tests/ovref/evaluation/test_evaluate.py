"""The evaluation end to end on a small collection, and against the segmenters people use."""

import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump, parse
from ovref.errors import ConfigError, InputError
from ovref.evaluation.datasets import LabelFolder
from ovref.evaluation.evaluate import (
    EvaluateSpec,
    evaluate,
    markdown,
    predict_fossil,
    predict_text,
    prepare_bench,
    scores_of,
    table,
)
from ovref.evaluation.miniature import OPENCUT
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import load_text_encoder, load_visual_encoder
from ovref_inference.errors import CollectionError
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.load import load_proposer, no_proposals, oracle_proposer
from ovref_inference.proposers.opencut import OpenCutConfig
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter


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
def told():
    return []


@pytest.fixture(scope="module")
def result(spec, told):
    return evaluate(spec, told.append, device="cpu")


@pytest.fixture(scope="module")
def bench(spec, collection_url):
    with ReferenceCollection.open(collection_url) as collection:
        yield prepare_bench(spec, collection, lambda line: None, device="cpu")


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
    ours, text = partial(predict_fossil, bench, spec.fossil), partial(predict_text, bench)
    expected = [ours("opencut"), ours("none"), ours("oracle")]
    expected += [text("none"), text("opencut"), text("oracle")]
    mious = [row["miou"] for row in result["rows"]]
    assert mious == [round(scores_of(bench, maps).miou, 4) for maps in expected]
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
    assert result["missing"] == []


def test_files_are_written_and_agree(result, spec, told):
    folder = spec.output
    with open(f"{folder}/evaluation.json") as file:
        assert json.load(file) == result
    with open(f"{folder}/evaluation.md") as file:
        page = file.read()
    assert page == markdown(result)
    assert result["caption"] in page and "| FOSSIL with oracle masks |" in page
    with Image.open(f"{folder}/predictions.png") as picture:
        assert picture.format == "PNG"
    assert told[-1] == table(result)


def test_ablations_that_nobody_asked_for_have_no_table(result):
    without = result | {"ablations": result["ablations"] | {"k": []}}
    assert "FOSSIL, K" in markdown(result) and "FOSSIL, K" not in markdown(without)
    assert "FOSSIL, K" in table(result) and "FOSSIL, K" not in table(without)


def test_a_collection_of_masked_crops_is_refused(spec):
    crops = VisualEncoderConfig(
        model="miniature:clip", library="open_clip", features="crop_binary", size_hw=(64, 64)
    )
    with pytest.raises(InputError, match=r"masked crops \(crop_binary\)"):
        prepare_bench(spec, SimpleNamespace(visual_config=crops), print)


def test_the_table_is_aligned(result):
    lines = [line for line in table(result).splitlines() if line.startswith(("method", "FOSSIL "))]
    main = [line for line in lines if "mIoU %" not in line and not line.endswith(".")][:3]
    assert len({len(line) for line in main}) == 1


def test_cached_features_give_what_the_segmenters_give(bench, spec, embed):
    visual, clip = load_visual_encoder(embed.visual), load_visual_encoder(spec.clip)
    text = load_text_encoder(embed.text)
    proposers = {
        "none": no_proposals,
        "opencut": load_proposer(ProposerConfig(opencut=spec.opencut)),
        "oracle": oracle_proposer(bench.data.labels, bench.data.images),
    }
    for masks, proposer in proposers.items():
        fossil = FossilSegmenter(bench.collection, visual, text, proposer, spec.fossil)
        text_only = TextOnlySegmenter(clip, text, proposer, windows=None)
        for segmenter, predicted in (
            (fossil, predict_fossil(bench, spec.fossil, masks)),
            (text_only, predict_text(bench, masks)),
        ):
            results = segmenter.segment(bench.data.images, bench.data.classes)
            for segmentation, label_hw in zip(results, predicted, strict=True):
                np.testing.assert_array_equal(segmentation.labels_hw, label_hw)


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
    with pytest.raises(ValueError, match=r"fossil\.windows must be null"):
        replace(spec, fossil=FossilConfig())


def test_a_collection_that_is_not_there_is_a_clear_error(spec, tmp_path):
    with pytest.raises(CollectionError, match="nowhere"):
        evaluate(replace(spec, collection=str(tmp_path / "nowhere")), lambda line: None)
