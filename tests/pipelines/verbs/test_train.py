"""`ovref train`: the verb, its configurations, several workers, and the use of its result."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import full_size
from ovref.config import dump, load
from ovref.errors import ConfigError, MismatchError
from ovref.miniature.scenes import render
from ovref.training.mask_settings import FcClipNetwork, FcClipTraining
from ovref.training.matching import MatchingLosses
from ovref.training.process_group import joined
from ovref.training.train_clip_rc import check, run
from ovref.training.train_masks import check as check_masks
from ovref_inference.proposers.mask_decoder import MaskDecoderConfig
from ovref_inference.segmenters.clip_rc import read_head
from ovref_pipelines import cli
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.verbs import train as verb
from ovref_pipelines.verbs.train import TrainConfig, with_absolute_places
from trained_heads import SPEC, UNSEEN, trained_head
from trained_masks import MASK_FORMER, SHARED

__all__ = ["trained_head"]
CONFIGS = Path(__file__).parents[3] / "configs"
PAPER = sorted(CONFIGS.glob("clip_rc_*.yaml"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A configuration file of the fixture's training, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(dump(SPEC)))
    return ["train", "--config", "small.yaml", "output=out"]


def test_a_training_is_used_to_segment_and_evaluated(small, trained_head, tmp_path, capsys):
    assert cli.main(small) == 0
    assert "step 4 of 4: loss" in capsys.readouterr().err
    weights = load_file(tmp_path / "out/clip_rc.safetensors")
    wanted = load_file(trained_head / "clip_rc.safetensors")
    assert all((weights[name] == wanted[name]).all() for name in wanted)
    Image.fromarray(np.full((50, 70, 3), 120, np.uint8)).save(tmp_path / "grey.png")
    asked = ["segment", "out", "grey.png", "--method", "clip_rc", "--classes", "sky,car,dragon"]
    assert cli.main([*asked, "--output", "segments"]) == 0
    pixels = json.loads((tmp_path / "segments/segment.json").read_text())["pixels"]
    assert sum(pixels.values()) == 50 * 70 and list(pixels) == ["sky", "car", "dragon"]
    asked = ["evaluate", "method=clip_rc", "clip_rc.weights=out", "output=evaluated"]
    asked += ["scenes=3", "pictures=0", f"unseen=[{', '.join(UNSEEN)}]"]
    assert cli.main(asked) == 0
    (row,) = json.loads((tmp_path / "evaluated/evaluation.json").read_text())["rows"]
    assert row["name"] == "CLIP-RC" and {"hiou", "seen", "unseen"} <= set(row)


def test_the_miniatures_head_needs_no_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(render(1, "test").image_hwc).save("scene.png")
    asked = ["segment", "miniature:clip_rc", "scene.png", "--method", "clip_rc"]
    assert cli.main([*asked, "--classes", "sky,car,grass", "--output", "segments"]) == 0
    assert sum(json.loads(Path("segments/segment.json").read_text())["pixels"].values()) == 64 * 64
    asked = ["evaluate", "method=clip_rc", "clip_rc.weights=miniature:clip_rc", "output=evaluated"]
    assert cli.main([*asked, "scenes=3", "pictures=0"]) == 0
    (row,) = json.loads(Path("evaluated/evaluation.json").read_text())["rows"]
    assert row["pixel_accuracy"] > 0.5


def test_a_dry_run_says_what_would_be_done(small, tmp_path, capsys):
    assert cli.main([*small, "--dry-run"]) == 0
    assert "24 classes with masks, 3 without" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_told(small, capsys):
    assert cli.main([*small, "data.seen=[car]"]) == 2
    assert "found both of ['car']" in capsys.readouterr().err
    assert cli.main([*small, "network.regions=9"]) == 2
    assert "9 regions (3 x 3) do not divide a grid of 8 x 8" in capsys.readouterr().err
    assert cli.main([*small, "training.batch=5", "training.accumulate=5", "data.limit=0"]) == 2
    assert "data.limit" in capsys.readouterr().err


def test_places_are_seen_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ["data.root=voc", "setting=transductive", "start=first"]
    config = with_absolute_places(load(TrainConfig, CONFIGS / "clip_rc_voc.yaml", changes))
    places = [config.output, config.data.root, config.start]
    assert places == [str(tmp_path / name) for name in ("runs/clip_rc_voc", "voc", "first")]


def test_a_launcher_must_tell_all(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"RANK is set .* WORLD_SIZE, MASTER_ADDR"):
        next(joined("cpu").gen)


def test_the_papers_settings():
    voc, context, coco = (
        load(TrainConfig, CONFIGS / f"clip_rc_{name}.yaml")
        for name in ("voc", "context", "coco_stuff")
    )
    for config in (voc, context, coco):
        network, training = config.network, config.training
        assert config.setting == "inductive" and network.model == "ViT-B-16:openai"
        assert (network.size_hw, network.regions, network.layers) == ((512, 512), 16, 3)
        assert (training.batch, training.schedule, training.warm_up) == (16, "poly", 1500)
        assert training.groups[0].pattern == "norm" and training.groups[0].decay == 0
    assert [c.training.steps for c in (voc, context, coco)] == [40_000, 40_000, 80_000]
    assert [c.network.prompts for c in (voc, context, coco)] == [10, 10, 100]
    assert (voc.losses.focal, voc.losses.dice, voc.losses.recovery) == (100, 1, 2)
    assert (coco.losses.focal, coco.losses.dice, coco.losses.recovery) == (200, 3, 50)


def test_the_method_says_which_settings_there_are(tmp_path):
    fcclip = verb.read(CONFIGS / "fcclip_coco.yaml", ["output=there"])
    open_one = verb.read(CONFIGS / "mask_former_coco_stuff.yaml", [])
    assert isinstance(fcclip, verb.TrainFcClip) and isinstance(open_one, verb.TrainMaskFormer)
    assert isinstance(verb.read(CONFIGS / "clip_rc_voc.yaml", []), TrainConfig)
    assert verb.with_absolute_places(fcclip).output == str(Path("there").absolute())
    with pytest.raises(ConfigError, match=r"method must be one of clip_rc, .* found 'detr'"):
        verb.read(CONFIGS / "fcclip_coco.yaml", ["method=detr"])
    with pytest.raises(ConfigError, match=r"setting"):
        verb.read(CONFIGS / "fcclip_coco.yaml", ["setting=supervised"])


def test_settings_of_the_released_heads():
    """FC-CLIP's and OVSeg's, typed a second time."""
    fcclip = verb.read(CONFIGS / "fcclip_coco.yaml", [])
    training, losses = fcclip.training, fcclip.losses
    assert (training.steps, training.batch, training.rate, training.decay) == (
        368_750, 16, 1e-4, 0.05,
    )  # fmt: skip
    assert (training.milestones, training.clip_norm) == ((327_778, 355_092), 0.01)
    assert (losses.classes, losses.masks, losses.dice, losses.void) == (2, 5, 5, 0.1)
    assert (losses.points, losses.oversample, losses.uncertain) == (12_544, 3, 0.75)
    assert fcclip.network.decoder.queries == 250 and fcclip.network.size_hw == (1024, 1024)
    assert len(fcclip.templates) == 14
    open_one = verb.read(CONFIGS / "mask_former_coco_stuff.yaml", [])
    training, losses, sizes = open_one.training, open_one.losses, open_one.network.sizes
    assert (training.steps, training.batch, training.rate, training.decay) == (
        120_000, 32, 6e-5, 0.01,
    )  # fmt: skip
    assert (training.warm_up, training.clip_norm, training.power) == (1500, 0.01, 0.9)
    assert (losses.classes, losses.masks, losses.dice, losses.void) == (1, 20, 1, 0.1)
    assert (sizes.embed_dim, sizes.depths, sizes.window) == (128, (2, 2, 18, 2), 12)
    assert (sizes.queries, sizes.decoder_layers, sizes.dropout, sizes.drop_path) == (
        100, 6, 0.1, 0.3,
    )  # fmt: skip
    assert open_one.network.size_hw == (640, 640)


def test_an_open_mask_former_is_trained_by_the_same_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    tree = dump(replace(MASK_FORMER, output="out")) | {"method": "mask_former"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["train", "--config", "small.yaml", "--dry-run"]) == 0
    assert "24 classes with masks, 3 without" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main(["train", "--config", "small.yaml", "training.steps=1"]) == 0
    assert "step 1 of 1: loss" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "checkpoints", "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip


def write_images(root):
    """Two training images of each of the three sets, in a published layout."""
    rng = np.random.default_rng(0)

    def pair(photo, labels, values):
        for path, pixels in (
            (photo, rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)),
            (labels, rng.choice(np.array(values, np.uint8), (3, 4)).repeat(100, 0).repeat(100, 1)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)

    for name in ("2008_1", "2008_2"):
        voc, context, coco = root / "voc", root / "context", root / "coco"
        pair(voc / f"JPEGImages/{name}.jpg", voc / f"SegmentationClassAug/{name}.png", range(21))
        pair(context / f"JPEGImages/{name}.jpg",
             context / f"SegmentationClassContext/{name}.png", range(60))  # fmt: skip
        pair(coco / f"train2017/{name}.jpg", coco / f"stuffthingmaps/train2017/{name}.png",
             [0, 1, 17, 95, 181, 255])  # fmt: skip
    for place in (
        "voc/ImageSets/Segmentation/trainaug",
        "context/ImageSets/SegmentationContext/train",
    ):
        path = root / f"{place}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("2008_1\n2008_2\n")


@pytest.fixture(scope="module")
def full_size_clip(tmp_path_factory):
    """CLIP's ViT-B/16 of random weights, with a small text tower."""
    folder = tmp_path_factory.mktemp("clip_b16")
    settings = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1},
    }  # fmt: skip
    model = open_clip.CLIP(**settings)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    described = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def difference(one, two):
    """Length of the difference of two heads' weights, as a share of the length of the first.

    Biases of an attention's keys are left out: they change nothing, so that their gradients are
    nothing but rounding errors, which Adam scales up.
    """
    heads = [read_head(str(place))[1] for place in (one, two)]
    for head in heads:
        for name in head:
            if name.endswith("in_proj_bias"):
                head[name].view(3, -1)[1] = 0.0
    first, second = (torch.cat([head[name].flatten() for name in heads[0]]) for head in heads)
    return float((first - second).norm() / first.norm())


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_real_step_at_full_size(path, full_size_clip, tmp_path):
    write_images(tmp_path)
    name = path.stem.removeprefix("clip_rc_").split("_")[0]
    given = [f"data.root={tmp_path / name}", f"network.model={full_size_clip}", "device=cpu"]
    text = check(load(TrainConfig, path, [*given, f"output={tmp_path / 'out'}"]).spec)
    seen, unseen = {"voc": (15, 5), "context": (50, 10), "coco": (156, 15)}[name]
    assert f"{seen} classes with masks, {unseen} without" in text
    assert "of 16 images one by one" in text


@pytest.mark.slow
def test_real_steps_of_the_mask_heads_at_full_size(tmp_path):
    root = full_size.write_coco(tmp_path / "coco")
    given = [f"data.root={root}", "device=cpu", f"output={tmp_path / 'out'}"]
    clip = full_size.write_convnext_large(tmp_path / "convnext")
    spec = verb.read(CONFIGS / "fcclip_coco.yaml", [*given, f"network.model={clip}"]).spec
    assert "133 classes with masks" in (text := check_masks(spec)) and "24 masks" in text
    clip = full_size.write_clip(tmp_path / "clip", 768, full_size.SMALL_VISION)
    swin = full_size.write_swin_base(tmp_path / "swin")
    given += [f"network.model={clip}", f"network.start.model={swin}"]
    text = check_masks(verb.read(CONFIGS / "mask_former_coco_stuff.yaml", given).spec)
    assert "171 classes with masks" in text and "of 32 images one by one" in text


def run_workers(given, folder):
    """Trains `one` in one process and `two` in two that find each other as launched ones do."""
    run = [sys.executable, "-m", "ovref_pipelines", "train", "--config", *given]
    options = {"cwd": folder, "env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}}
    subprocess.run([*run, "output=one"], check=True, capture_output=True, **options)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
    processes = []
    for rank in range(2):
        options["env"] = options["env"] | address | {"WORLD_SIZE": "2", "RANK": str(rank)}
        processes.append(
            subprocess.Popen([*run, "output=two"], stderr=subprocess.PIPE, text=True, **options)
        )
    said = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "step 4 of 4" in said[0] and "step 4 of 4" not in said[1]


@pytest.mark.slow
def test_launched_workers_train_what_one_does(small, trained_head, tmp_path):
    """Without dropout, whose random numbers are those of each part of a batch."""
    run_workers([small[2], "network.dropout=0.0"], tmp_path)
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4
    assert difference(tmp_path / "one", trained_head) > 1e-3  # of a training with dropout


def head_weights(folder):
    """The weights of a trained head as one vector, without biases of keys (see `difference`)."""
    (path,) = folder.glob("*.safetensors")
    found = load_file(path)
    for name in found:
        if name.endswith("in_proj_bias"):
            found[name].view(3, -1)[1] = 0.0
    kept = [n for n in sorted(found) if not n.endswith(("k_proj.bias", "key.bias"))]
    return torch.cat([found[name].flatten() for name in kept])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fcclip", "mask_former"])
def test_launched_workers_train_the_mask_head_that_one_does(method, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    spec = MASK_FORMER
    if method == "fcclip":
        tree = yaml.safe_load((CONFIGS / "miniature_fcclip.yaml").read_text())["network"]
        decoder = MaskDecoderConfig(**tree["decoder"] | {"widths": (*tree["decoder"]["widths"],)})
        network = FcClipNetwork(model=tree["model"], size_hw=(64, 64), decoder=decoder)
        spec = FcClipTraining(network=network, losses=MatchingLosses(points=64), **SHARED)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(dump(spec) | {"method": method}))
    run_workers([str(tmp_path / "small.yaml")], tmp_path)
    one, two = (head_weights(tmp_path / name) for name in ("one", "two"))
    assert float((one - two).norm() / one.norm()) < 1e-4


@pytest.mark.slow
def test_workers_of_ray_train_what_one_process_does(local_ray, trained_head, tmp_path):
    from ovref_pipelines.ray import training_group

    network = replace(SPEC.network, dropout=0.0)
    engine = EngineConfig(engine="ray", workers=2)
    lines = []
    for name in ("one", "two"):
        spec = replace(SPEC, network=network, output=str(tmp_path / name))
        if name == "one":
            run(spec, lambda line: None)
        else:
            training_group.run(spec, engine, lines.append)
    assert any("step 4 of 4" in line for line in lines)
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4
    assert difference(tmp_path / "one", trained_head) > 1e-3  # of a training with dropout
    wrong = replace(SPEC, output=str(tmp_path / "one"))  # with dropout
    with pytest.raises(MismatchError, match=r"network.dropout was 0.0 and is now 0.1"):
        training_group.run(wrong, engine, lines.append)
