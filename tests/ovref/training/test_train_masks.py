"""Training FC-CLIP's head and an open MaskFormer: what they are shown, and what they leave."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import SwinConfig, SwinModel

from fcclip_folder import DIM, decoder_config, write_clip
from ovref.errors import InputError, MismatchError, ModelError
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES
from ovref.storage.file_store import Store
from ovref.training import checkpoints, train_masks
from ovref.training.labelled_batches import TrainingData
from ovref.training.mask_settings import (
    FcClipNetwork,
    FcClipTraining,
    MaskFormerNetwork,
    Start,
)
from ovref.training.matching import MatchingLosses
from ovref.training.train_masks import check, prepare, run
from ovref_inference.encoders.clip_towers import load_clip
from ovref_inference.proposers.config import FcClipConfig, MaskFormerConfig
from ovref_inference.proposers.fcclip import load_fcclip, read_settings
from ovref_inference.proposers.mask_former import load_mask_former
from trained_masks import MASK_FORMER, SHARED, SIZES, UNSEEN

SEEN = tuple(name for name in CLASSES if name not in UNSEEN)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), "resnet")


@pytest.fixture(scope="module")
def specs(clip):
    """The two trainings."""
    decoder = decoder_config(load_clip(clip, "")[0].visual)
    network = FcClipNetwork(model=clip, size_hw=(64, 64), decoder=decoder)
    losses = MatchingLosses(points=64)
    return {
        "fcclip": FcClipTraining(network=network, losses=losses, **SHARED),
        "mask_former": MASK_FORMER,
    }


METHODS = pytest.mark.parametrize("method", ["fcclip", "mask_former"])


def silent(line):
    pass


@pytest.fixture(scope="module")
def trained(specs, tmp_path_factory):
    """Outputs of both, trained once."""
    folders = {name: tmp_path_factory.mktemp(name) for name in specs}
    for name, spec in specs.items():
        run(replace(spec, output=str(folders[name])), silent)
    return folders


def weights_of(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


IMAGE = render(3, "test").image_hwc


def test_a_trained_fcclip_is_a_proposer(trained, clip):
    settings = read_settings(trained["fcclip"])
    assert settings.trained_names == SEEN and settings.clip == clip
    assert settings.training["unseen"] == list(UNSEEN) and settings.training["steps"] == 4
    assert "output" not in settings.training["settings"]
    config = FcClipConfig(model=str(trained["fcclip"]), short_side=64, long_side=96)
    (found,) = load_fcclip(config, device="cpu").propose([IMAGE])
    assert found.features_of == clip and found.open_classes.templates == ("a {}.",)
    saved = checkpoints.read(Store.open(str(trained["fcclip"])), 4)
    own = {n.removeprefix("head."): v for n, v in saved.weights.items()}
    tensors = weights_of(trained["fcclip"])
    assert all(torch.equal(tensors[name], value) for name, value in own.items())
    assert not any("visual" in name for name in saved.weights)
    assert [set(row) for row in saved.history] == [
        {"step", "rate", "loss", "norm", "classes", "masks", "dice"}
    ] * 2


def test_a_trained_mask_former_is_a_proposer(trained, specs):
    config = MaskFormerConfig(model=str(trained["mask_former"]), min_score=0.0)
    model = load_mask_former(config, device="cpu")
    assert model.knows_objects
    (found,) = model.propose([IMAGE])
    assert found.trained_names == SEEN and found.class_probs_nc.shape == (6, 25)
    assert found.open_classes.embeddings_nd.shape == (6, 64)
    described = json.loads((trained["mask_former"] / "config.json").read_text())["open_classes"]
    assert described["training"]["data"] == "miniature train, 12 scenes"
    made = prepare(replace(specs["mask_former"], output=str(trained["mask_former"])))
    texts = weights_of(trained["mask_former"])["trained_texts"]
    torch.testing.assert_close(texts, made.network.head.trained_texts)


@torch.no_grad()
@METHODS
def test_the_last_layer_is_what_the_model_answers(specs, method, tmp_path):
    made = prepare(replace(specs[method], output=str(tmp_path)))
    network = made.network.eval()
    pixels = torch.randn(1, 3, 64, 64)
    layers = network(pixels)
    assert len(layers) == {"fcclip": 5, "mask_former": 2}[method]
    if method == "mask_former":
        answer = network.head(pixel_values=pixels)
        torch.testing.assert_close(layers[-1].masks_bqhw, answer.masks_queries_logits)
        torch.testing.assert_close(layers[-1].embeddings_bqd, answer.class_queries_logits)
    network.train()
    assert made.network.visual is None or not made.network.visual.training


@METHODS
def test_a_stopped_training_resumes_to_the_same_model(
    trained, specs, method, tmp_path, monkeypatch
):
    real = train_masks.LabelledBatches.__call__

    def stopping(self, step, part, parts):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, part, parts)

    spec = replace(specs[method], output=str(tmp_path))
    monkeypatch.setattr(train_masks.LabelledBatches, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(spec, silent)
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.undo()
    lines = []
    run(spec, lines.append)
    assert lines[0] == "resuming after step 2 of 4" and "written to" in lines[-1]
    assert same(weights_of(tmp_path), weights_of(trained[method]))
    other = replace(spec, losses=replace(spec.losses, void=0.3))
    with pytest.raises(MismatchError, match=r"losses.void was 0.1 and is now 0.3"):
        run(other, silent)


@METHODS
def test_accumulated_parts_give_the_step_of_the_whole(trained, specs, method, tmp_path):
    """So do two workers, whose random points are those of one."""
    spec = specs[method]
    training = replace(spec.training, accumulate=2)
    run(replace(spec, output=str(tmp_path), training=training), silent)
    losses = [
        [row["loss"] for row in checkpoints.read(Store.open(str(folder)), 4).history]
        for folder in (tmp_path, trained[method])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


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


@METHODS
def test_masks_and_names_of_unseen_classes_change_nothing(specs, method, tmp_path, monkeypatch):
    """Trained with the masks of unseen classes swapped for each other's, the weights are equal."""
    unseen = [CLASSES.index(name) for name in UNSEEN]

    def swapped(label_hw):
        chosen = np.select([label_hw == n for n in unseen], np.roll(unseen, 1), label_hw)
        return chosen.astype(np.uint8)

    asked = []
    real = train_masks.class_embeddings
    spy = lambda *given: asked.append(given[1]) or real(*given)  # noqa: E731
    monkeypatch.setattr(train_masks, "class_embeddings", spy)
    found = []
    training = replace(SHARED["training"], steps=2, batch=4)
    for name, change in (("true", np.asarray), ("swapped", swapped)):
        data = folder_of(tmp_path / name, 12, change)
        out = tmp_path / name / "out"
        run(replace(specs[method], output=str(out), data=data, training=training), silent)
        found.append(weights_of(out))
    assert any(np.isin(render(n, "train").label_hw, unseen).any() for n in range(12))
    assert same(*found) and asked == [SEEN] * 2


@METHODS
def test_a_dry_run_makes_a_step_and_writes_nothing(specs, method, tmp_path):
    text = check(replace(specs[method], output=str(tmp_path / "out")))
    assert "24 classes with masks, 3 without: car, mushroom, balloon" in text
    assert "masks in" in text and "4 steps of 2 images" in text
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_mask_former_begins_with_a_swin_of_transformers(tmp_path):
    """Equal features of the two implementations, whose weights have other names."""
    settings = SwinConfig(
        image_size=64, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=4, mlp_ratio=4.0, drop_path_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(4)
    swin = SwinModel(settings, add_pooling_layer=False).eval()
    swin.save_pretrained(tmp_path / "swin")
    start = Start(model=str(tmp_path / "swin"))
    spec = replace(MASK_FORMER, output=str(tmp_path / "out"))
    spec = replace(spec, network=replace(spec.network, start=start))
    encoder = prepare(spec).network.head.model.pixel_level_module.encoder.eval()
    pixels = torch.randn(1, 3, 64, 64)
    wanted = swin(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(encoder.model(pixels).last_hidden_state, wanted)
    sizes = replace(SIZES, depths=(1, 1, 2, 1))
    with pytest.raises(ModelError, match="of another architecture or width"):
        prepare(replace(spec, network=replace(spec.network, sizes=sizes)))


@torch.no_grad()
def test_a_mask_former_begins_with_another(trained, tmp_path):
    """All but the classes is that of the first; another kind of model is refused."""
    spec = replace(MASK_FORMER, output=str(tmp_path))

    def begun(model):
        network = replace(spec.network, start=Start(model=model))
        return prepare(replace(spec, network=network)).network.head

    first = weights_of(trained["mask_former"])
    own = begun(str(trained["mask_former"])).state_dict()
    plain = prepare(spec).network.head.state_dict()
    for name in ("mask_embedder.0.0.weight", "model.transformer_module.queries_embedder.weight"):
        torch.testing.assert_close(own[name], first[name])
    assert torch.equal(own["class_predictor.0.weight"], plain["class_predictor.0.weight"])
    with pytest.raises(ModelError, match="it is a dinov2, expected a swin or maskformer"):
        begun("miniature:dinov2")


def test_what_does_not_fit_is_refused(specs, tmp_path):
    spec = replace(specs["fcclip"], output=str(tmp_path / "out"))

    def prepared(**changes):
        return prepare(replace(spec, network=replace(spec.network, **changes)))

    decoder = replace(spec.network.decoder, dim=99)
    with pytest.raises(ModelError, match=rf"must have widths .* dim {DIM}, .* found .* and 99"):
        prepared(decoder=decoder)
    with pytest.raises(ModelError, match="no ConvNeXt or ResNet image tower"):
        prepared(model="miniature:clip")
    for network in (FcClipNetwork, MaskFormerNetwork):
        with pytest.raises(ValueError, match="size_hw must be multiples of 32"):
            network(size_hw=(64, 70))
    with pytest.raises(ValueError, match="a number for each of four stages"):
        replace(SIZES, depths=(1, 1))
    with pytest.raises(ValueError, match="features must be a multiple of 32"):
        replace(SIZES, features=40)
    with pytest.raises(ValueError, match=r"found both of \['cup'\]"):
        TrainingData(scenes=4, seen=("cup",), unseen=("cup",))


@METHODS
def test_a_loss_that_is_not_finite_names_the_images(specs, method, tmp_path, monkeypatch):
    """A later step's images are broken: training stops, and the last checkpoint is kept."""
    spec = replace(specs[method], output=str(tmp_path))
    real = train_masks.losses_of

    def broken(*given):
        losses = real(*given)
        return lambda network, batch: {
            name: term * (torch.nan if batch.first >= 6 else 1)
            for name, term in losses(network, batch).items()
        }

    monkeypatch.setattr(train_masks, "losses_of", broken)
    with pytest.raises(ModelError, match=r"not finite at step 4 .*for the images .*step 2 is kept"):
        run(spec, silent)
    assert checkpoints.steps_saved(Store.open(str(tmp_path))) == [2]


def test_a_damaged_label_is_told_before_models_load(specs, tmp_path, monkeypatch):
    data = folder_of(tmp_path, 3, lambda label_hw: label_hw + np.uint8(40))
    monkeypatch.setattr(train_masks, "load_text_encoder", None)
    with pytest.raises(InputError, match="40"):
        prepare(replace(specs["fcclip"], data=data, output=str(tmp_path / "out")))
