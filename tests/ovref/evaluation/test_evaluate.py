"""The evaluation end to end on a small collection, and against the segmenters people use."""

import csv
import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump, parse
from ovref.errors import ConfigError, InputError, MismatchError
from ovref.evaluation import cached, counting
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.evaluate import EvaluateSpec, evaluate
from ovref.evaluation.methods import Methods, Row
from ovref.evaluation.metrics_semantic import confusion, scores_of_counts
from ovref.evaluation.miniature import OPENCUT
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.evaluation.oracle import label_masks, oracle_proposer
from ovref.evaluation.report import markdown, text
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import load_text_encoder, load_visual_encoder
from ovref_inference.errors import CollectionError
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.load import load_proposer, no_proposals
from ovref_inference.proposers.opencut import OpenCutConfig
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
from ovref_inference.segmenters.freeda import FreedaConfig
from ovref_inference.segmenters.windows import WindowConfig
from paper_tables.datasets import in_memory
from paper_tables.predictions import evaluate_predictions


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
def data(spec):
    return in_memory(spec.open_data())


@pytest.fixture(scope="module")
def methods(spec):
    opened = spec.open_data()
    with CachedModels(device="cpu") as models:
        found = Methods(spec, opened, models)
        found.encode_batch(list(opened))
        yield found


def scores_of(labels, predictions, classes):
    pairs = zip(labels, predictions, strict=True)
    return scores_of_counts(sum(confusion(*pair, len(classes)) for pair in pairs))


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


def test_every_row_is_of_the_masks_that_it_names(result, methods, spec, data):
    mious = [row["miou"] for row in result["rows"]]
    for name, miou in zip(spec.rows, mious, strict=True):
        found = [methods.predict(Row(name=name), image_hwc).labels_hw for image_hwc in data.images]
        assert miou == round(scores_of(data.labels, found, data.classes).miou, 4)
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


def test_a_collection_of_masked_crops_is_refused_for_dense_rows(spec):
    crops = SimpleNamespace(
        visual_config=VisualEncoderConfig(
            model="miniature:clip", library="open_clip", features="crop_binary", size_hw=(64, 64)
        )
    )
    with pytest.raises(InputError, match=r"masked crops \(crop_binary\), and FOSSIL, .* compare"):
        Methods(spec, spec.open_data(), CachedModels(), crops)
    Methods(replace(spec, rows=("vocseg", "text_only")), spec.open_data(), CachedModels(), crops)


def test_the_table_is_aligned(result):
    lines = [line for line in text(result).splitlines() if line.startswith(("method", "FOSSIL "))]
    main = [line for line in lines if "mIoU %" not in line and not line.endswith(".")][:3]
    assert len({len(line) for line in main}) == 1


def test_cached_models_give_what_the_segmenters_give(methods, spec, embed, data):
    visual, clip = load_visual_encoder(embed.visual), load_visual_encoder(spec.clip)
    texts = load_text_encoder(embed.text)
    masks = [label_masks(label_hw) for label_hw in data.labels]
    proposers = {
        "no_proposals": no_proposals,
        "opencut": load_proposer(ProposerConfig(opencut=spec.opencut)),
        "oracle": oracle_proposer(data.images, masks),
    }
    for name, proposer in proposers.items():
        fossil = FossilSegmenter(methods.collection, visual, texts, proposer, spec.fossil)
        text_only = TextOnlySegmenter(clip, texts, proposer, windows=None)
        rows = {"no_proposals": ("fossil_no_proposals", "text_only"), "opencut": ("fossil",
                "text_only_opencut"), "oracle": ("fossil_oracle", "text_only_oracle")}  # fmt: skip
        for plain, row in zip((fossil, text_only), rows[name], strict=True):
            results = plain.segment(data.images, data.classes)
            for found, image_hwc in zip(results, data.images, strict=True):
                np.testing.assert_array_equal(
                    found.labels_hw, methods.predict(Row(name=row), image_hwc).labels_hw
                )


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of a loaded encoder got."""
    seen = []

    def counted(config, device=None):
        encoder = load_visual_encoder(config, device=device)
        encode = encoder.encode
        encoder.encode = lambda images: seen.append(len(images)) or encode(images)
        return encoder

    monkeypatch.setattr(cached, "load_region_encoder", counted)
    return seen


def test_models_run_once_for_all_rows_and_ablations(spec, encoded, tmp_path):
    """Each encoder sees each image once, although some twelve rows are measured; batches of the
    windows of several images."""
    evaluate(
        replace(spec, output=str(tmp_path), pictures=0, batch_size=3),
        lambda line: None,
        device="cpu",
    )
    assert encoded == [3, 3, 2, 2]


def test_twenty_settings_and_further_runs_encode_nothing_again(spec, encoded, tmp_path, result):
    """Settings of N, K and gamma in one run; then runs that change gamma, and OpenCut's thresholds,
    over the features that the first one has kept."""
    first = replace(spec, output=str(tmp_path / "first"), pictures=0, rows=("fossil",),
                    ablate_n=(2, 3, 4, 5, 6, 7), ablate_k=(1, 2, 3, 4, 5),
                    ablate_gamma=tuple(np.linspace(0, 1, 9).tolist()),
                    features=str(tmp_path / "features"))  # fmt: skip
    found = evaluate(first, lambda line: None, device="cpu")
    scores = [row["miou"] for rows in found["ablations"].values() for row in rows]
    assert len(scores) == 20 and len(set(scores)) > 8 and encoded == [5]
    assert found["rows"][0] == result["rows"][0]
    common = replace(first, ablate_n=(), ablate_k=(), ablate_gamma=())
    other_gamma = replace(
        common, fossil=replace(spec.fossil, gamma=1.0), output=str(tmp_path / "second")
    )
    second = evaluate(other_gamma, lambda line: None, device="cpu")
    assert second["rows"][0]["miou"] == found["ablations"]["gamma"][-1]["miou"]
    cut = replace(spec.opencut, cut=replace(spec.opencut.cut, taus=(0.5,)))
    third = replace(common, opencut=cut, output=str(tmp_path / "third"))
    assert evaluate(third, lambda line: None, device="cpu")["rows"][0]["miou"] != scores[0]
    assert encoded == [5]


def test_a_stopped_evaluation_resumes_with_the_same_totals(spec, monkeypatch, tmp_path, result):
    small = replace(spec, output=str(tmp_path), shard_size=2, pictures=0, ablate_n=(), ablate_k=(),
                    ablate_gamma=(), rows=("fossil_no_proposals", "text_only"))  # fmt: skip
    scored, real = [], counting.counts_of

    def stop(example, *rest):
        scored.append(example.id)
        if len(scored) == 6:
            raise KeyboardInterrupt
        return real(example, *rest)

    monkeypatch.setattr(counting, "counts_of", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small, lambda line: None, device="cpu")
    assert len(list(tmp_path.glob("scores/_commits/*"))) == 1
    found = evaluate(small, lambda line: None, device="cpu")
    again = evaluate(small, lambda line: None, device="cpu")
    assert scored[6:] == ["2", "2", "3", "3", "4", "4"]  # and none a third time
    assert found["rows"] == again["rows"] == [result["rows"][1], result["rows"][3]]
    assert found["per_class"] == again["per_class"]
    with pytest.raises(MismatchError, match=r"settings\.fossil\.n was 6 and is now 5"):
        evaluate(replace(small, fossil=replace(spec.fossil, n=5)), lambda line: None)


def test_the_report_says_where_classes_fail(result, spec, data, methods):
    table = {row["class"]: row for row in result["per_class"]}
    assert list(table) == list(data.classes) == result["classes"]
    found = [methods.predict(Row(name="fossil"), image_hwc).labels_hw for image_hwc in data.images]
    counts = sum(
        confusion(*pair, len(data.classes)) for pair in zip(data.labels, found, strict=True)
    )
    for label, (name, row) in enumerate(table.items()):
        wrong = np.delete(counts[label], label)
        assert row["pixels"] == counts[label].sum() and row["references"] > 0
        assert row["most_confused_with"] in ("", *data.classes, "no class")
        if row["pixels"]:
            assert row["confused_share"] == pytest.approx(wrong.max() / row["pixels"], abs=1e-4)
        assert (row["most_confused_with"] == "") == (wrong.max() == 0), name
    with open(f"{spec.output}/confusion.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["pixels"]) for row in rows) == counts.sum()
    with open(f"{spec.output}/images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0", "1", "2", "3", "4"]
    one = scores_of(data.labels[:1], found[:1], data.classes)
    assert float(rows[0]["FOSSIL: IoU"]) == pytest.approx(one.miou, abs=1e-4)
    assert float(rows[0]["FOSSIL: right"]) == pytest.approx(one.pixel_accuracy, abs=1e-4)
    with Image.open(f"{spec.output}/worst.png") as picture:
        assert picture.format == "PNG"


def test_segments_are_judged_where_the_truth_has_them(result, spec, data, methods):
    """As the tables of the papers judge them: all of them at once, in memory."""
    for name, row in zip(spec.rows, result["rows"], strict=True):
        predictions = [methods.predict(Row(name=name), one, segments=True) for one in data.images]
        metrics = evaluate_predictions(data, predictions).metrics
        for metric in ("pq", "sq", "rq", "pq_things", "pq_stuff", "ap"):
            assert row[metric] == pytest.approx(metrics[metric], abs=1e-4)
    assert len({row["pq"] for row in result["rows"]}) > 3


def test_boundaries_are_measured_where_asked(spec, tmp_path):
    asked = replace(spec, boundaries=True, scenes=2, rows=("fossil_oracle", "text_only"),
                    output=str(tmp_path), pictures=0)  # fmt: skip
    rows = evaluate(asked, lambda line: None, device="cpu")["rows"]
    assert 0 <= rows[1]["boundary_iou"] < rows[0]["boundary_iou"] <= 1


def test_synonyms_of_a_class_take_the_best_of_them(spec, methods, data, folder, tmp_path):
    """The first image, asked for with two classes under other names as well."""
    lines = [f"{name};{other}" if other else name for name, other in zip(
        data.classes, ["heaven", "wall of bricks"] + [""] * 30, strict=False)]  # fmt: skip
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    fossil = replace(spec.fossil, floor=None)  # no name is too far from every noun
    changed = replace(spec, folder=folder, rows=("fossil",), limit=1, fossil=fossil)
    opened = changed.open_data()
    with CachedModels(device="cpu") as models:
        found = Methods(changed, opened, models)
        assert len(found.names) == len(data.classes) + 2
        example = opened.read(opened.ids[0])
        found.encode_batch([example])
        labels_hw = found.predict(Row(name="fossil"), example.image_hwc).labels_hw
        own = found.segmenter(Row(name="fossil")).segment([example.image_hwc], found.names)[0]
    best_chw = own.scores_chw
    grouped = np.stack([
        best_chw[[i for i, name in enumerate(found.names) if name in names]].max(0)
        for names in opened.class_list.classes
    ])  # fmt: skip
    np.testing.assert_array_equal(labels_hw, grouped.argmax(0))


@pytest.fixture
def folder(tmp_path, data):
    """Two of the scenes as files, one of them cut to another size."""
    (tmp_path / "classes.txt").write_text("\n".join(data.classes))
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for index, rows in enumerate((64, 40)):
            Image.fromarray(getattr(data, kind)[index][:rows].astype(np.uint8)).save(
                tmp_path / kind / f"{index}.png"
            )
    return LabelFolder(
        images=str(tmp_path / "images"),
        labels=str(tmp_path / "labels"),
        classes=str(tmp_path / "classes.txt"),
        unseen=data.classes[::2],
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
    # The first image is a scene too.
    one, scene = (
        evaluate(replace(changed, output=str(tmp_path / name)), lines.append, device="cpu")
        for name, changed in {
            "one": replace(spec, limit=1), "scene": replace(spec, folder=None, scenes=1)
        }.items()
    )  # fmt: skip
    for row, same in zip(one["rows"], scene["rows"], strict=True):
        assert row["miou"] == same["miou"] and "hiou" not in same


def test_changed_labels_are_not_taken_for_the_ones_that_were_counted(spec, folder, tmp_path):
    spec = replace(
        spec, folder=folder, output=str(tmp_path / "out"), rows=("text_only",), pictures=0,
        ablate_n=(), ablate_k=(), ablate_gamma=(),
    )  # fmt: skip
    evaluate(spec, lambda line: None, device="cpu")
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder.labels, moved)
    elsewhere = replace(spec, folder=replace(folder, labels=str(moved)))
    evaluate(elsewhere, lambda line: None, device="cpu")  # the same files at another place
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(moved / "0.png")
    with pytest.raises(MismatchError, match="files"):
        evaluate(elsewhere, lambda line: None, device="cpu")


def test_a_named_set_scores_what_the_same_files_score_as_a_folder(spec, data, tmp_path):
    voc = tmp_path / "VOC2010"
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (voc / folder).mkdir(parents=True)
    for index in range(2):
        # Without loss, so that the pixels are those of the scenes; decoders go by the content.
        Image.fromarray(data.images[index]).save(voc / f"JPEGImages/{index}.jpg", "PNG")
        Image.fromarray(data.labels[index].astype(np.uint8)).save(
            voc / f"SegmentationClassContext/{index}.png"
        )
    (voc / "ImageSets/SegmentationContext/val.txt").write_text("0\n1\n")
    names = [*data.classes, *(f"nothing {n}" for n in range(60 - len(data.classes)))]
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
    same = evaluate(
        replace(spec, folder=folder, output=str(tmp_path / "same")), lambda line: None, device="cpu"
    )
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
    with pytest.raises(ValueError, match=r"freeda\.windows must be null"):
        replace(spec, freeda=FreedaConfig())
    with pytest.raises(ValueError, match="rows must name one or more rows, each once"):
        replace(spec, rows=("fossil", "fossil"))
    with pytest.raises(ConfigError, match="no protocol 'tlc'"):
        replace(spec, protocol="tlc")


def test_windows_of_a_protocol_are_those_that_a_segmenter_slides_itself(spec, data, methods):
    windows = WindowConfig(short_side=64, long_side=200, crop=48, stride=16)
    changed = replace(spec, fossil=replace(spec.fossil, windows=windows), scenes=2)
    opened = changed.open_data()
    with CachedModels(device="cpu") as models:
        slid = Methods(changed, opened, models)
        slid.encode_batch(list(opened))
        found = [slid.predict(Row(name="fossil"), one).labels_hw for one in data.images[:2]]
        own = slid.fossil(changed.fossil)
        own.config = changed.fossil
        expected = [one.labels_hw for one in own.segment(data.images[:2], data.classes)]
        oracle = [slid.predict(Row(name="fossil_oracle"), one).labels_hw for one in data.images[:2]]
        once = Methods(replace(changed, proposals="image"), opened, models)
        once.encode_batch(list(opened))
        for name in ("fossil_oracle", "fossil_no_proposals"):  # to which it makes no difference
            np.testing.assert_array_equal(
                once.predict(Row(name=name), data.images[0]).labels_hw,
                slid.predict(Row(name=name), data.images[0]).labels_hw,
            )
        other = [once.predict(Row(name="fossil"), one).labels_hw for one in data.images[:2]]
    # Rounding differs, where two classes are nearly equal.
    assert min(np.mean(a == b) for a, b in zip(found, expected, strict=True)) > 0.999
    whole = [methods.predict(Row(name="fossil"), one).labels_hw for one in data.images[:2]]
    assert max(np.mean(a == b) for a, b in zip(found, whole, strict=True)) < 0.999
    assert scores_of(data.labels[:2], oracle, data.classes).pixel_accuracy > 0.5
    assert min(np.mean(a == b) for a, b in zip(found, other, strict=True)) < 1
    assert "windows of 48 at stride 16" in slid.protocol.described()


def test_a_collection_that_is_not_there_is_a_clear_error(spec, tmp_path):
    with pytest.raises(CollectionError, match="nowhere"):
        evaluate(replace(spec, collection=str(tmp_path / "nowhere")), lambda line: None)
