"""Rows of the papers' tables: all pass the dry run, and one runs through on the miniature."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config

import paper_data
from fcclip_folder import write_fcclip
from ovref.config import dump, load
from ovref.errors import ConfigError, InputError, ModelError
from ovref.evaluation.named_sets.bundled_classes import bundled, bundled_list
from ovref.evaluation.named_sets.definitions import SETS
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES
from ovref_pipelines import cli, recipe
from ovref_pipelines.console import Console
from ovref_pipelines.verbs import paper_rows, reproduce
from ovref_pipelines.verbs.row_weights import models_of_row, try_models
from ovref_pipelines.verbs.train import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("papers") / "data"
    paper_data.write_all(root)
    return root


@pytest.fixture(scope="module")
def checked_before():
    """What `check` looks at -> its result, for rows that differ in their settings alone."""
    return {}


def looked_at(row):
    corpora = [dump(one.corpus) for one in (row.build, row.fallback) if one]
    trainings = [(one.setting, dump(one.data)) for one in (row.first, row.train) if one]
    spec = row.evaluate
    data = (spec.dataset, spec.root, spec.protocol)
    return repr([data, corpora, trainings, sorted(models_of_row(row))])


@pytest.mark.parametrize("name", paper_rows.names())
def test_every_row_passes_the_dry_run(name, data, tmp_path, monkeypatch, checked_before):
    drawn = []
    monkeypatch.setattr(reproduce, "prediction_grid", lambda *arguments: drawn.append(arguments))
    row = paper_rows.read_row(paper_rows.find(name), data=str(data), runs=str(tmp_path))
    if (key := looked_at(row)) not in checked_before:
        checked_before[key] = reproduce.check(row)
        ((images, columns, classes, path),) = drawn  # a legend of 847 names takes seconds
        assert path == tmp_path / name / reproduce.PICTURE
        assert images[0].shape[:2] == columns["truth"][0].shape
        assert columns["truth"][0].max() < len(classes)
    checked = checked_before[key]
    assert checked.problems == ()
    # The stand-ins are fewer than what was published, which is said and stops a run.
    images = SETS[row.evaluate.dataset].images["val"]
    assert any(f"as published {images}" in one for one in checked.partial)
    page = reproduce.introduction(row)
    assert row.paper in page and f"Protocol {row.evaluate.protocol}: " in page
    assert row.needs and all(f"  - {one}\n" in page for one in row.needs)
    assert row.gpu_hours > 0 and f"About {row.gpu_hours:g} GPU hours of an H100" in page
    assert all(f"  - {one}\n" in page for one in (*row.leaves_open, *row.differs))
    for metric, value in row.figures.items():
        assert f"{reproduce.report.COLUMNS[metric]} {value}" in page
    # Ours beside the paper's, which a run ends with: here a point better in the first figure.
    first, *others = row.figures
    ours = {metric: value / 100 for metric, value in row.figures.items()}
    title, header, line, *lines = reproduce.comparison(
        row, ours | {first: ours[first] + 0.01}
    ).splitlines()
    assert title == row.paper and header.split("  ")[-1] == "difference"
    assert line.split()[-3:] == [
        f"{row.figures[first]:.1f}", f"{row.figures[first] + 1:.1f}", "+1.0",
    ]  # fmt: skip
    assert len(lines) == len(others) and all(one.endswith("+0.0") for one in lines)
    if row.build is None:
        assert row.evaluate.clip_rc.weights == row.train.output
        assert any(f"{row.train.setting} training with" in line for line in checked.lines)
    else:
        assert row.evaluate.collection == f"{row.build.output}/collection"
        assert all(any(
            line.startswith(f"{one.corpus.path}: ") for line in checked.lines
        ) for one in (row.build, row.fallback) if one)  # fmt: skip
    assert row.evaluate.chosen_protocol().names in ("mmseg", "fcclip", "corrclip")


def test_the_rows_are_those_of_the_tables():
    """Figures typed a second time, from the papers."""

    def figures(name):
        row = paper_rows.read_row(paper_rows.find(name), data="/data", runs="/runs")
        return tuple(row.figures.values())

    assert [figures(f"fossil_{n}") for n in ("context", "coco_stuff", "ade", "cityscapes")] == [
        (35.8,), (24.8,), (18.8,), (23.2,),
    ]  # fmt: skip
    assert [figures(f"fossil_ade_{n}") for n in ("mae", "dino")] == [(2.0,), (12.0,)]
    vocseg = ("pas20", "ade150", "ade847", "pc59", "pc459")
    assert [figures(f"vocseg_{n}")[0] for n in vocseg] == [93.4, 22.5, 8.1, 47.3, 10.8]
    tables = ("none", "heatmap", "text", "visual")
    assert [figures(f"vocseg_ade150_{n}")[0] for n in tables] == [17.7, 17.7, 21.0, 20.1]
    assert [figures(f"vocseg_pas20_{n}")[0] for n in tables] == [82.51, 85.0, 92.6, 93.2]
    assert figures("retclip_l") == (16.1, 10.3, 22.2) and figures("retclip_b") == (12.7, 7.5, 17.3)
    assert figures("retclip_l_truth") == (28.4, 17.3, 39.4)
    databases = ("_fcclip", "_open_images", "")
    assert [figures(f"retclip_rn50x64{n}") for n in databases] == [
        (22.8, 13.6, 28.4), (23.7, 14.1, 32.4), (27.1, 15.1, 36.9),
    ]  # fmt: skip
    assert [figures(f"retclip_convnext{n}") for n in databases] == [
        (26.4, 16.8, 34.0), (28.3, 17.7, 38.3), (30.9, 19.3, 44.0),
    ]  # fmt: skip
    for n in ("ade150", "pas20"):
        assert [figures(f"vocseg_{n}_open{m}") for m in ("", "_text", "_visual")] == [
            figures(f"vocseg_{n}{m}") for m in ("", "_text", "_visual")
        ]
    assert [figures(f"clip_rc_{n}")[1] for n in ("voc", "context", "coco_stuff")] == [
        88.4, 51.9, 41.2,
    ]  # fmt: skip
    wanted = {"transductive": [93.0, 55.1, 49.7], "supervised": [93.7, 56.7, 51.4]}
    for setting, values in wanted.items():
        names = [f"clip_rc_{n}_{setting}" for n in ("voc", "context", "coco_stuff")]
        assert [figures(name)[1] for name in names] == values
    found = [figures(f"clip_rc_context{n}_from_coco") for n in (60, 59)]
    assert found == [(62.1, 42.3, 68.8), (70.9, 49.2, 69.9)]


ABLATIONS = {
    "plain": 84.3, "bridge": 85.4, "bridge_alignment": 87.4, "updated": 87.9, "tokens1": 86.9,
    "tokens4": 87.3, "tokens64": 89.1, "tokens256": 89.2, "patches": 85.6, "global": 86.6,
    "regions": 87.0, "l2": 86.7, "recovery2": 87.1, "recovery3": 87.0,
}  # fmt: skip
"""Tables 5 to 8 of CLIP-RC: hIoU on VOC 2012."""


def harmonic(one, other):
    return 2 * one * other / (one + other)


def test_rows_of_clip_rc_are_those_of_its_tables():
    rows = {
        name: paper_rows.read_row(paper_rows.find(name), data="/data", runs="/runs")
        for name in paper_rows.names()
        if name.startswith("clip_rc_")
    }
    assert len(rows) == 9 + 2 + len(ABLATIONS)
    assert {name: rows[f"clip_rc_voc_{name}"].figures["hiou"] for name in ABLATIONS} == ABLATIONS
    for row in rows.values():  # figures that were typed wrong would not fit each other
        if "hiou" in row.figures:  # the paper's own are up to 0.16 off
            wanted = harmonic(row.figures["seen"], row.figures["unseen"])
            assert row.figures["hiou"] == pytest.approx(wanted, abs=0.2)
    # The settings are those of `ovref train --config`.
    for name in ("voc", "context", "coco_stuff"):
        theirs = rows[f"clip_rc_{name}"].train
        ours = load(TrainConfig, paper_rows.folder().parent / f"clip_rc_{name}.yaml")
        assert dataclasses.replace(theirs.data, root=ours.data.root) == ours.data
        assert dataclasses.replace(theirs.training, accumulate=1) == ours.training
        for part in ("network", "losses", "templates", "setting"):
            assert getattr(theirs, part) == getattr(ours, part)
        assert rows[f"clip_rc_{name}"].evaluate.chosen_protocol().seen_penalty == 0.1
        row = rows[f"clip_rc_{name}_transductive"]
        assert row.first == theirs and row.train.start == theirs.output
        assert (row.train.setting, row.train.training.steps) == (
            "transductive", ours.training.steps // 2,
        )  # fmt: skip
        assert row.evaluate.chosen_protocol().seen_penalty == 0.0
        assert rows[f"clip_rc_{name}_supervised"].train.setting == "supervised"
    assert rows["clip_rc_context59_from_coco"].train == rows["clip_rc_coco_stuff"].train
    settings = {name: rows[f"clip_rc_voc_{name}"].train.network for name in ABLATIONS}
    assert [settings[f"tokens{n}"].regions for n in (1, 4, 64, 256)] == [1, 4, 64, 256]
    assert [settings[n].align for n in ("patches", "global", "regions")] == [
        (), ("global",), ("regions",),
    ]  # fmt: skip
    assert settings["updated"].update_regions and settings["plain"].regions == 0
    assert [settings[n].recovery_layers for n in ("bridge", "recovery2", "recovery3")] == [0, 2, 3]
    assert rows["clip_rc_voc_l2"].train.losses.recovery_kind == "l2"


WEIGHTS = {
    (1.0, 1.0, 0.3): 24.8, (0.5, 0.7, 0.3): 30.3, (0.4, 0.9, 0.3): 29.9, (0.4, 0.8, 0.3): 30.3,
    (0.4, 0.7, 1.0): 25.4, (0.4, 0.7, 0.7): 27.8, (0.4, 0.7, 0.6): 28.8, (0.4, 0.7, 0.5): 27.8,
    (0.4, 0.7, 0.4): 29.7, (0.4, 0.7, 0.3): 30.9, (0.4, 0.7, 0.2): 30.9, (0.4, 0.7, 0.1): 29.9,
    (0.4, 0.7, 0.0): 26.4, (0.3, 0.7, 0.3): 30.5,
}  # fmt: skip
"""Table 4 of RetCLIP: alpha, beta, gamma -> PQ."""


def test_rows_of_retclip_across_data_sets_are_those_of_its_tables():
    rows = [
        paper_rows.read_row(paper_rows.find(name), data="/data", runs="/runs")
        for name in paper_rows.names()
        if name.startswith("retclip_convnext")
    ]
    found = {
        (row.evaluate.retclip.alpha, row.evaluate.retclip.beta, row.evaluate.retclip.gamma):
            row.figures["pq"]
        for row in rows
        if "table 4" in row.paper or "tables 1 and 4" in row.paper
    }  # fmt: skip
    assert found == WEIGHTS
    for row in rows:
        visual, proposer = row.build.embed.visual, row.evaluate.proposer
        # Regions of query and database are embedded by one CLIP, at one size.
        assert visual.model == f"{proposer.fcclip.model}/clip" == row.build.embed.text.model
        size = (proposer.fcclip.short_side, proposer.fcclip.long_side)
        assert (visual.size_hw, visual.aspect, visual.features) == (size, "kept", "tokens")
    by_output = {row.build.output: row.build for row in rows}
    (falling,) = [row for row in rows if row.fallback is not None]
    assert falling.fallback == by_output["/runs/retclip_convnext_open_images_collection"]
    assert falling.evaluate.fallback == f"{falling.fallback.output}/collection"
    assert falling.build == by_output["/runs/retclip_convnext_collection"]
    (baseline,) = [row.evaluate.retclip for row in rows if "FC-CLIP;" in row.paper]
    assert (baseline.fusion, baseline.gamma, baseline.beta) == ("geometric", 0.0, 0.8)


def test_settings_are_the_papers():
    def row(name):
        return paper_rows.read_row(paper_rows.find(name), data="/data", runs="/runs")

    found = [row(f"fossil_{n}").evaluate.fossil for n in ("context", "coco_stuff", "cityscapes")]
    assert [(f.n, f.k, f.gamma) for f in found] == [(70, 10, 0.7), (95, 25, 0.5), (95, 30, 0.55)]
    fossil = row("fossil_ade")
    assert (fossil.build.synthesize.binarise.band, fossil.build.synthesize.steps) == (0.0, 50)
    cut = fossil.evaluate.opencut
    assert (cut.keys.model, cut.keys.features, cut.keys.size_hw, cut.crf_at, cut.cut.eta_unit) == (
        "facebook/dino-vitb8", "keys", (480, 480), "cuts", "pixels",
    )  # fmt: skip
    names = ("pas20", "ade150", "ade847", "pc59", "pc459")
    found = [row(f"vocseg_{n}").evaluate.vocseg for n in names]
    assert [f.alpha for f in found] == [0.8, 0.35, 0.2, 0.9, 0.1]
    assert [f.beta for f in found] == [0.6, 0.7, 0.7, 0.6, 0.6]
    vocseg = row("vocseg_ade150_heatmap").build
    assert (
        vocseg.embed.visual.features
        == "crop_heatmap_black"
        == (vocseg.ground.proposals.visual.features)
    )
    assert len(vocseg.embed.templates) == 21 and not (
        vocseg.ground.proposals.proposer.mask_former.exclusive
    )
    gammas = [row(f"retclip_b{n}").evaluate.retclip.gamma for n in ("", "_clip", "_retrieval")]
    assert gammas == [0.3, 0.0, 1.0]


def test_what_is_missing_is_named_all_at_once(data, tmp_path, capsys):
    arguments = ["reproduce", "vocseg_ade847", "--data", str(tmp_path), "--runs", str(tmp_path)]
    assert cli.main([*arguments, "--dry-run"]) == 2
    shown = capsys.readouterr().out
    assert "MISSING" in shown and "does not contain ade847" in shown
    assert "captions_train2017.json" in shown and "VOCSeg, table 3: ADE-847" in shown
    assert cli.main(arguments) == 2
    assert "cannot be run" in capsys.readouterr().err
    # Fewer images than published stop a run too, unless that is wanted.
    arguments = ["reproduce", "fossil_ade", "--data", str(data), "--runs", str(tmp_path)]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert "NOT AS PUBLISHED" in capsys.readouterr().out
    with Image.open(tmp_path / "fossil_ade" / reproduce.PICTURE) as picture:
        assert picture.size[0] > paper_data.SIZE_HW[1]
    assert cli.main(arguments) == 2
    assert "--partial accepts what differs" in capsys.readouterr().err
    row = paper_rows.read_row(paper_rows.find("retclip_b"), data=str(data), runs=str(tmp_path))
    stopped = dataclasses.replace(row, blocked=("no such model",))
    checked = reproduce.Checked(lines=(), problems=(), partial=())
    with pytest.raises(InputError, match="cannot be run: no such model"):
        reproduce.reproduce(stopped, checked, Console(), partial=True)


@pytest.fixture
def checked(data, tmp_path):
    """What `check` says of a row with settings of the user's."""

    def check(name, *overrides):
        path, places = paper_rows.find(name), {"data": str(data), "runs": str(tmp_path)}
        rows = [paper_rows.read_row(path, **places, overrides=each) for each in (overrides, ())]
        return reproduce.check(*rows)

    return check


def test_weights_of_another_architecture_are_not_as_published(checked, data, tmp_path):
    """A model of the row's architecture is accepted from any folder; nothing is loaded."""
    Dinov2Config(hidden_size=384, num_hidden_layers=12, patch_size=14).save_pretrained(
        tmp_path / "small"
    )
    Dinov2Config(hidden_size=1024, num_hidden_layers=24, patch_size=14).save_pretrained(
        tmp_path / "large"
    )
    setting = "build.embed.visual.model"
    assert not any("dinov2" in one for one in checked("fossil_ade").partial)
    large = checked("fossil_ade", f"{setting}={tmp_path / 'large'}")
    assert not any("dinov2" in one for one in large.partial) and large.problems == ()
    (said,) = (one for one in checked("fossil_ade", f"{setting}={tmp_path / 'small'}").partial
               if setting in one)  # fmt: skip
    assert said.endswith(
        "has hidden_size 384, num_hidden_layers 12; the row's dinov2-large has hidden_size 1024, "
        "num_hidden_layers 24"
    )
    keys = checked("fossil_ade", "evaluate.opencut.keys.model=miniature:dino").partial
    assert any("the row's dino-vitb8 has hidden_size 768" in one for one in keys)
    text = checked("fossil_ade", "build.embed.text.model=miniature:clip").partial
    assert any("the row's ViT-L-14:openai has embed_dim 768" in one for one in text)


def test_files_and_folders_below_data_are_of_what_their_names_say(checked, data, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(data / "weights", weights)
    positions = torch.zeros(1).expand(1, 64, 64, 1280)
    torch.save({"image_encoder.pos_embed": positions}, weights / "sam_vit_b_01ec64.pth")
    setting = "build.ground.detector.sam.model"
    for name in ("retclip_convnext", "retclip_b"):
        assert not any(setting in one for one in checked(name).partial)
        (said,) = (one for one in checked(name, f"{setting}={weights}/sam_vit_b_01ec64.pth").partial
                   if setting in one)  # fmt: skip
        assert "has vision_config.hidden_size 1280; the row's sam_vit_b_01ec64.pth has" in said
    setting = "build.embed.visual.model"
    other = f"{setting}={weights}/fcclip_rn50x64/clip"
    assert any(setting in one for one in checked("retclip_convnext", other).partial)
    (weights / "fcclip_rn50x64/clip/open_clip_config.json").write_text("{")
    problems = checked("retclip_convnext", other).problems
    assert any("cannot read the architecture" in one for one in problems)


def test_models_of_the_evaluation_are_tried_before_anything_is_built(data, tmp_path, monkeypatch):
    folder = tmp_path / "dino"
    Dinov2Config(hidden_size=768, num_hidden_layers=12).save_pretrained(folder)
    built = []
    monkeypatch.setattr(recipe, "build", lambda *_: built.append(1))
    row = paper_rows.read_row(
        paper_rows.find("fossil_ade"), data=str(data), runs=str(tmp_path),
        overrides=[f"evaluate.opencut.keys.model={folder}"],
    )  # fmt: skip
    nothing = reproduce.Checked(lines=(), problems=(), partial=())
    with pytest.raises(ModelError, match="cannot load the visual encoder"):
        reproduce.reproduce(row, nothing, Console(), partial=True)
    assert not built
    keys = ["evaluate.opencut.keys.model=miniature:dino", "evaluate.opencut.keys.size_hw=[64, 64]"]
    try_models(
        paper_rows.read_row(
            paper_rows.find("fossil_ade"), data=str(data), runs=str(tmp_path), overrides=keys
        )
    )


def test_unknown_rows_and_files_that_extend_themselves(tmp_path, capsys):
    assert cli.main(["reproduce", "list"]) == 0
    assert "fossil_ade\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"no row 'fosil'.*fossil_ade"):
        paper_rows.find("fosil")
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(ConfigError, match="extends itself"):
        paper_rows.read_row(tmp_path / "a.yaml", data="d", runs="r")
    with pytest.raises(ConfigError, match="cannot read"):
        (tmp_path / "a.yaml").write_text("extends: c\n")
        paper_rows.read_row(tmp_path / "a.yaml", data="d", runs="r")
    with pytest.raises(ConfigError, match="must both have a training"):
        (tmp_path / "b.yaml").write_text("after: d\n")
        (tmp_path / "d.yaml").write_text("paper: nothing\n")
        paper_rows.read_row(tmp_path / "b.yaml", data="d", runs="r")
    with pytest.raises(ConfigError, match="must both have a build, because of fallback"):
        (tmp_path / "b.yaml").write_text("fallback: d\n")
        paper_rows.read_row(tmp_path / "b.yaml", data="d", runs="r")
    with pytest.raises(ConfigError, match=r"figures must be of .*found \['mIou'\]"):
        path = tmp_path / "c.yaml"
        path.write_text((paper_rows.folder() / "fossil_ade.yaml").read_text())
        for base in paper_rows.folder().glob("_*.yaml"):
            (tmp_path / base.name).write_text(base.read_text())
        path.write_text(path.read_text().replace("miou: 18.8", "mIou: 18.8"))
        paper_rows.read_row(path, data="d", runs="r")


SMALL = [
    "build.corpus.path=config:miniature_captions.txt", "build.corpus.format=text",
    "build.corpus.limit=40", "build.corpus.repeats=false", "build.shard_size=20",
    "build.engine.engine=local",
    "build.engine.gpus_per_worker=0", "build.engine.workers=1",
    "build.synthesize.model=miniature:stable_diffusion", "build.synthesize.steps=8",
    "build.synthesize.guidance=4.0", "build.synthesize.size_hw=[64, 64]",
    "build.synthesize.dtype=float32", "build.synthesize.compiled=false",
    "build.synthesize.factors=[1]", "build.embed.visual.model=miniature:dinov2",
    "build.embed.visual.size_hw=[64, 64]", "build.embed.visual.precision=float32",
    "build.embed.text.model=miniature:clip", "evaluate.opencut.keys.model=miniature:dino",
    "evaluate.opencut.keys.size_hw=[64, 64]", "evaluate.fossil.n=10", "evaluate.fossil.k=2",
    "captions=40",
]  # fmt: skip


@pytest.mark.slow
def test_a_row_runs_through_on_the_miniature(tmp_path, capsys):
    """Scenes stand in for ADE20k's photographs, with the ids of the classes that both have."""
    names = bundled_list("ade150", "mmseg").names
    value_of = np.array([names.index(name) + 1 if name in names else 0 for name in CLASSES])
    assert (value_of > 0).sum() >= 8
    base = tmp_path / "data/ade/ADEChallengeData2016"
    for part in ("images", "annotations"):
        (base / part / "validation").mkdir(parents=True)
    for seed in range(2):
        scene = render(seed, "test")
        name = f"validation/ADE_val_{seed:08d}"
        Image.fromarray(scene.image_hwc).save(base / f"images/{name}.jpg", quality=95)
        values_hw = value_of[scene.label_hw].astype(np.uint8)
        Image.fromarray(values_hw).save(base / f"annotations/{name}.png")
    places = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--partial"]
    assert cli.main(["reproduce", "fossil_ade", *places, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "the paper" in shown and "18.8" in shown
    found = json.loads((tmp_path / "runs/fossil_ade" / reproduce.RESULT).read_text())
    assert 0 < found["ours"]["miou"] <= 100 and found["figures"] == {"miou": 18.8}
    assert found["protocol"].startswith("tcl: short side 448") and found["not_as_published"]
    # Again: nothing is built or scored a second time.
    assert cli.main(["reproduce", "fossil_ade", *places, *SMALL]) == 0
    assert json.loads((tmp_path / "runs/fossil_ade" / reproduce.RESULT).read_text()) == found


RETCLIP = [
    "build.engine.engine=local", "build.engine.workers=1", "build.engine.gpus_per_worker=0",
    "build.ground.detector.detector.model=miniature:grounding_dino",
    "build.ground.detector.detector.box_threshold=0.1",
    "build.ground.detector.detector.text_threshold=0.1",
    "build.ground.detector.sam.model=miniature:sam", "build.embed.visual.precision=float32",
    "build.embed.visual.size_hw=[64, 96]", "evaluate.proposer.fcclip.short_side=64",
    "evaluate.proposer.fcclip.long_side=96",
]  # fmt: skip


def write_ade_scenes(base):
    """Scenes as ADE20k's photographs of both splits, with its classes where it has them and with
    its instances."""
    names, instances = bundled_list("ade150", "mmseg").names, bundled("ade150", "mmseg")
    value_of = np.array([names.index(name) + 1 if name in names else 0 for name in CLASSES])
    category = {value: number + 1 for number, value in enumerate(instances["instances"])}
    for split, folder in (("train", "training"), ("val", "validation")):
        for seed in range(4):
            scene = render(seed, "train" if split == "train" else "test")
            values_hw = value_of[scene.label_hw].astype(np.uint8)
            instances_hwc = np.zeros((*values_hw.shape, 3), np.uint8)
            red = np.array([category.get(value, 0) for value in range(151)])[values_hw]
            instances_hwc[..., 0], instances_hwc[..., 1] = red, scene.instance_hw
            instances_hwc[(red == 0) | (scene.instance_hw == 0)] = 0
            for part, pixels, ending in (
                ("images", scene.image_hwc, "jpg"),
                ("annotations", values_hw, "png"),
                ("annotations_instance", instances_hwc, "png"),
            ):
                path = base / part / folder / f"ADE_{split}_{seed:08d}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


@pytest.mark.slow
def test_a_row_with_a_trained_proposer_runs_through_in_small(tmp_path, capsys):
    """A small FC-CLIP of random weights proposes, and its CLIP embeds the database."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    write_ade_scenes(data / "ade/ADEChallengeData2016")
    model = write_fcclip(data / "weights/fcclip_convnext_large", names=("sky", "car"))
    sam = data / "weights/sam_vit_b_01ec64.pth"
    sam.write_bytes(b"")  # miniature:sam stands in for it
    row = ["reproduce", "retclip_convnext", "--data", str(data), "--runs", str(runs), "--partial"]
    assert cli.main([*row, *RETCLIP]) == 0
    shown = capsys.readouterr().out
    assert "the paper" in shown and "30.9" in shown
    found = json.loads((runs / "retclip_convnext" / reproduce.RESULT).read_text())
    assert found["figures"] == {"pq": 30.9, "ap": 19.3, "miou": 44.0}
    assert all(0 <= value <= 100 for value in found["ours"].values())
    manifest = runs / "retclip_convnext_collection/collection/collection.json"
    assert json.loads(manifest.read_text())["visual"]["model"] == f"{model}/clip"
    assert cli.main([*row, *RETCLIP]) == 0
    # Another row of table 4 asks the same collection.
    other = ["reproduce", "retclip_convnext_a10_b10_g03", *row[2:], *RETCLIP]
    assert cli.main(other) == 0
    again = json.loads((runs / "retclip_convnext_a10_b10_g03" / reproduce.RESULT).read_text())
    assert again["ours"] != found["ours"]


TINY = [
    f"{part}.{setting}"
    for part in ("train", "first")
    for setting in (
        "network.model=miniature:clip", "network.size_hw=[64, 64]", "network.regions=4",
        "network.heads=4", "network.ffn=32", "network.prompts=2", "data.short_side=64",
        "training.steps=4", "training.batch=2", "training.accumulate=1", "training.save_every=2",
        "training.warm_up=0", "device=cpu",
    )
]  # fmt: skip


@pytest.mark.slow
def test_a_row_with_two_trainings_runs_through_on_the_miniature(data, tmp_path, capsys):
    """The transductive training takes the middle checkpoint of the inductive one before it."""
    places = ["--data", str(data), "--runs", str(tmp_path), "--partial"]
    assert cli.main(["reproduce", "clip_rc_voc_transductive", *places, *TINY]) == 0
    shown = capsys.readouterr()
    assert "the paper" in shown.out and "93.0" in shown.out
    assert "inductive training with voc_15_5 train, 2 of 10582 images" in shown.out
    trained = [tmp_path / f"clip_rc_voc{n}_training" for n in ("", "_transductive")]
    heads = [json.loads((folder / "clip_rc.json").read_text()) for folder in trained]
    assert [head["setting"] for head in heads] == ["inductive", "transductive"]
    found = json.loads((tmp_path / "clip_rc_voc_transductive" / reproduce.RESULT).read_text())
    assert set(found["ours"]) == {"pixel_accuracy", "hiou", "seen", "unseen"}
    assert "-0.1" not in found["protocol"] and 0 <= found["ours"]["pixel_accuracy"] <= 100
    assert cli.main(["reproduce", "clip_rc_voc_transductive", *places, *TINY]) == 0
