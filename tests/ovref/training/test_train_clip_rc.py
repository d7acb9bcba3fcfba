"""Training CLIP-RC on the miniature: its three settings, what it is shown, and what it leaves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ovref.errors import InputError, MismatchError, ModelError
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES
from ovref.storage.file_store import Store
from ovref.training import checkpoints, train_clip_rc
from ovref.training.labelled_batches import TrainingData
from ovref.training.train_clip_rc import (
    ClipRcLosses,
    ClipRcTraining,
    check,
    losses_of,
    prepare,
    run,
)
from ovref_inference.segmenters.clip_rc import read_head
from trained_heads import SPEC, UNSEEN, spec_at


def silent(line):
    pass


def weights_of(folder):
    return load_file(folder / "clip_rc.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_it_writes_a_head_that_says_what_it_is(trained_head):
    head, tensors = read_head(str(trained_head))
    assert head.unseen == UNSEEN and len(head.seen) == 24 and head.setting == "inductive"
    assert head.network == SPEC.network and head.dim == 64
    assert head.training["steps"] == 4 and head.training["data"] == "miniature train, 40 scenes"
    assert head.training["settings"]["losses"]["focal"] == 100.0
    assert not any(name.startswith("recovery") or "visual" in name for name in tensors)
    saved = checkpoints.read(Store.open(str(trained_head)), 4)
    assert any(name.startswith("recovery") for name in saved.weights)
    assert same({n: v for n, v in saved.weights.items() if n in tensors}, tensors)
    assert checkpoints.steps_saved(Store.open(str(trained_head))) == [2, 4]
    assert [set(row) for row in saved.history] == [
        {"step", "rate", "loss", "norm", "focal", "dice", "recovery"}
    ] * 2


def test_a_stopped_training_resumes_to_the_same_head(trained_head, tmp_path, monkeypatch):
    real = train_clip_rc.LabelledBatches.__call__

    def stopping(self, step, part, parts):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, part, parts)

    monkeypatch.setattr(train_clip_rc.LabelledBatches, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(spec_at(tmp_path), silent)
    assert not (tmp_path / "clip_rc.json").exists()
    monkeypatch.undo()
    lines = []
    run(spec_at(tmp_path), lines.append)
    assert lines[0] == "resuming after step 2 of 4" and "written to" in lines[-1]
    assert same(weights_of(tmp_path), weights_of(trained_head))


def folder_of(root, count, change):
    """Scenes with label maps that `change` has changed, and their class list."""
    for seed in range(count):
        scene = render(seed, "train")
        for part, pixels in (("images", scene.image_hwc), ("labels", change(scene.label_hw))):
            (root / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / part / f"{seed}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return TrainingData(
        folder=LabelFolder(
            images=str(root / "images"), labels=str(root / "labels"),
            classes=str(root / "classes.txt"), unseen=UNSEEN,
        ),
        short_side=64, threads=1,
    )  # fmt: skip


@pytest.mark.parametrize("unlabelled", ["ignored", "negative"])
def test_masks_and_names_of_unseen_classes_change_nothing(tmp_path, monkeypatch, unlabelled):
    """Trained with the masks of unseen classes swapped for each other's, the weights are equal."""
    unseen = [CLASSES.index(name) for name in UNSEEN]

    def swapped(label_hw):
        return np.select([label_hw == label for label in unseen], np.roll(unseen, 1), label_hw)

    asked = []
    real = train_clip_rc.class_embeddings
    spy = lambda *given: asked.append(given[1]) or real(*given)  # noqa: E731
    monkeypatch.setattr(train_clip_rc, "class_embeddings", spy)
    found = []
    for name, change in (("true", np.asarray), ("swapped", lambda m: swapped(m).astype(np.uint8))):
        data = folder_of(tmp_path / name, 24, change)
        losses = ClipRcLosses(unlabelled=unlabelled)
        run(spec_at(tmp_path / name / "out", data=data, losses=losses), silent)
        found.append(weights_of(tmp_path / name / "out"))
    assert any((np.isin(render(n, "train").label_hw, unseen)).any() for n in range(24))
    assert same(*found)
    assert asked == [[n for n in CLASSES if n not in UNSEEN]] * 2
    assert same(found[0], found[1])


def test_transductive_begins_with_the_middle_checkpoint_and_knows_the_names(
    trained_head, tmp_path, monkeypatch
):
    spec = spec_at(tmp_path / "out", setting="transductive", start=str(trained_head))
    made = prepare(spec)
    middle = checkpoints.read(Store.open(str(trained_head)), 2)
    assert same(made.network.trained_state(), middle.weights)
    assert len(made.split.classes) == 27 and len(made.split.shown) == 24
    shown = set(np.unique(np.concatenate([made.batches(s, 0, 1).labels_nhw for s in range(9)])))
    assert -2 in shown and not shown & {CLASSES.index(name) for name in UNSEEN}
    run(spec, silent)
    head, _ = read_head(str(tmp_path / "out"))
    assert head.setting == "transductive" and head.unseen == UNSEEN
    assert not same(weights_of(tmp_path / "out"), weights_of(trained_head))


def test_self_training_pulls_hidden_pixels_to_unseen_classes(trained_head, tmp_path):
    spec = spec_at(tmp_path, setting="transductive", start=str(trained_head))
    made = prepare(spec)
    batch = next(
        b for b in (made.batches(s, 0, 4) for s in range(99)) if (b.labels_nhw == -2).any()
    )
    hidden = torch.from_numpy(batch.labels_nhw == -2)
    logits = torch.zeros(1, 27, 8, 8, requires_grad=True)
    pixels = lambda images, size_hw: None  # noqa: E731

    class Output:
        logits_nchw, recovery = logits, None

    unseen = torch.zeros(27, dtype=torch.bool)
    unseen[[CLASSES.index(name) for name in UNSEEN]] = True
    losses = losses_of(ClipRcLosses(), torch.zeros(27, 64), unseen, pixels)
    losses(lambda *_: Output, batch)["focal"].sum().backward()
    up = torch.nn.functional.interpolate(-logits.grad, size=(64, 64), mode="nearest")[0]
    inside = torch.nn.functional.max_pool2d(hidden.float(), 8) > 0.9
    share = -torch.nn.functional.max_pool2d(-hidden.float(), 8)  # cells of hidden pixels alone
    assert inside.any() and share.any()
    cells = torch.nn.functional.interpolate(share[None], size=(64, 64), mode="nearest")[0, 0] > 0
    first = int(torch.nonzero(unseen)[0])  # of equal scores the first
    assert (up[first][cells] > 0).all()


def test_supervised_training_is_shown_everything(tmp_path):
    spec = spec_at(tmp_path, setting="supervised")
    run(replace(spec, training=replace(spec.training, steps=1)), silent)
    head, _ = read_head(str(tmp_path))
    assert head.seen == CLASSES and head.unseen == () and head.setting == "supervised"


def test_a_dry_run_makes_a_step_and_writes_nothing(tmp_path):
    text = check(spec_at(tmp_path / "out"))
    assert "24 classes with masks, 3 without: car, mushroom, balloon" in text
    assert "million weights to train on miniature:clip" in text
    assert "4 steps of 4 images" in text
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_go_together_are_refused(trained_head, tmp_path):
    with pytest.raises(ValueError, match="give start with setting transductive"):
        spec_at(tmp_path, setting="transductive")
    with pytest.raises(ValueError, match="give start with setting transductive"):
        spec_at(tmp_path, start=str(trained_head))
    with pytest.raises(MismatchError, match=r"losses.focal was 100.0 and is now 50.0"):
        run(spec_at(trained_head, losses=ClipRcLosses(focal=50.0)), silent)


def test_an_unfit_start_is_refused(trained_head, tmp_path):
    spec = spec_at(tmp_path, setting="transductive", start=str(trained_head))
    other = replace(spec, data=replace(spec.data, unseen=("car", "cup")))
    with pytest.raises(MismatchError, match=r"holds a training with other settings: seen"):
        run(other, silent)
    wide = replace(spec, network=replace(spec.network, ffn=16))
    with pytest.raises(MismatchError, match=r"network.ffn was 32 and is now 16"):
        run(wide, silent)
    with pytest.raises(InputError, match="no checkpoint of half its steps"):
        run(replace(spec, start=str(tmp_path)), silent)
    with pytest.raises(InputError, match="has no unseen classes"):
        run(replace(spec, data=replace(spec.data, unseen=())), silent)


def test_data_is_checked_before_any_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train_clip_rc, "load_network", None)
    data = TrainingData(dataset="voc_15_5", root=str(tmp_path))
    with pytest.raises(InputError, match="does not contain voc_15_5, split train"):
        run(spec_at(tmp_path / "out", data=data), silent)


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(tmp_path, monkeypatch):
    spec = spec_at(tmp_path)
    spec = replace(spec, training=replace(spec.training, rate=1e30, save_every=1))
    with pytest.raises(ModelError, match="not finite at step"):
        run(spec, silent)
    assert checkpoints.steps_saved(Store.open(str(tmp_path)))
    assert not (tmp_path / "clip_rc.json").exists()


def test_the_json_file_has_the_whole_configuration(trained_head):
    tree = json.loads((trained_head / "clip_rc.json").read_text())
    assert tree["format_version"] == 1
    assert tree["training"]["settings"]["data"]["unseen"] == list(UNSEEN)
    assert isinstance(SPEC, ClipRcTraining)
