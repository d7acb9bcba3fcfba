"""A released FC-CLIP is converted by its names, and used; anything else is refused."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from fcclip_folder import DIM, TOWERS
from fcclip_released import released_head
from ovref.errors import InputError
from ovref.exchange.checkpoints import convert_fcclip, read_tensors
from ovref_inference.proposers.config import FcClipConfig
from ovref_inference.proposers.fcclip import TEMPLATES, load_fcclip

NAME = "small_convnext_for_tests"
WIDTHS = (40, 80, 160, 320)
NAMES = ("tree", "boat", "ship")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The file of a training, as detectron2 saves it, with a small CLIP that open_clip knows."""
    folder = tmp_path_factory.mktemp("released")
    settings = {
        "embed_dim": DIM, "vision_cfg": TOWERS["convnext"],
        "text_cfg": {"width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    (folder / f"{NAME}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(3)
    clip = open_clip.CLIP(**settings).state_dict()
    tensors = {f"backbone.clip_model.{name}": value for name, value in clip.items()}
    tensors |= released_head(widths=WIDTHS, dim=DIM)
    # The number of heads is in no tensor: the released models have 8.
    for i in range(2):
        for name, count in (("sampling_offsets", 2), ("attention_weights", 1)):
            prefix = f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}.self_attn.{name}"
            tensors[f"{prefix}.weight"] = torch.randn(count * 96, 32) * 0.1
            tensors[f"{prefix}.bias"] = torch.randn(count * 96) * 0.1
    tensors["criterion.empty_weight"] = torch.ones(134)
    path = folder / "fcclip.pth"
    torch.save({"model": tensors, "iteration": 368749}, path)
    return path, tensors


def convert(checkpoint, output, clip=NAME, names=NAMES):
    return convert_fcclip(checkpoint, output, clip=clip, trained_names=names)


def test_a_checkpoint_becomes_a_folder_that_proposes(released, tmp_path):
    path, tensors = released
    found = convert(path, tmp_path / "fcclip")
    assert found["queries"] == 5 and found["clip"] == sum("clip_model" in n for n in tensors)
    stored = load_file(tmp_path / "fcclip" / "decoder.safetensors")
    assert len(stored) == found["decoder"]
    name = "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_weight"
    torch.testing.assert_close(
        stored["transformer.decoder.layers.1.self_attn.k_proj.weight"], tensors[name][32:64]
    )
    proposer = load_fcclip(
        FcClipConfig(model=str(tmp_path / "fcclip"), short_side=64, long_side=64), device="cpu"
    )
    (proposals,) = proposer.propose([np.full((64, 64, 3), 90, np.uint8)])
    assert proposals.trained_names == NAMES and proposals.open_classes.templates == TEMPLATES
    assert np.isclose(proposals.open_classes.scale, np.exp(3.1), rtol=1e-5)
    void = tensors["void_embedding.weight"][0].numpy()
    np.testing.assert_allclose(
        proposals.open_classes.void_d, void / np.linalg.norm(void), atol=1e-6
    )


def test_safetensors_are_read_too(released, tmp_path):
    _, tensors = released
    save_file(tensors, tmp_path / "fcclip.safetensors")
    assert set(read_tensors(tmp_path / "fcclip.safetensors")) == set(tensors)


class Harmful:
    def __reduce__(self):
        return print, ("this must never be shown",)


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1)}, "x": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        read_tensors(tmp_path / "harmful.pth")
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_refused_and_nothing_is_written(released, tmp_path):
    path, tensors = released
    output = tmp_path / "out"

    def saved(changed):
        torch.save(changed, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    head = "sem_seg_head.predictor"
    lacking = {n: v for n, v in tensors.items() if n != f"{head}.decoder_norm.bias"}
    without = {n: v for n, v in tensors.items() if n != "void_embedding.weight"}
    clip = {n: v for n, v in tensors.items() if not n.startswith("sem_seg_head")}
    wide = tensors | {f"{head}.mask_embed.layers.0.bias": torch.ones(9)}
    for checkpoint, options, message in (
        (path, {"clip": "convnext_giant"}, "open_clip knows no architecture"),
        (path, {"clip": "RN50"}, "the CLIP is no RN50: it lacks"),
        (path, {"names": (" ",)}, "name the classes"),
        (saved(tensors | {f"{head}.mood": torch.ones(1)}), {}, "predictor.mood, which FC-CLIP"),
        (saved(lacking), {}, "its decoder: it lacks transformer.decoder.layernorm.bias"),
        (saved(without), {}, "decoder is incomplete"),
        (saved(wide), {}, r"mask_embedder\.0\.0\.bias \(9,\) instead of \(32,\)"),
        (saved(clip), {}, "is no FC-CLIP"),
        (saved([1, 2]), {}, "holds no model but a list"),
        (tmp_path / "none.pth", {}, "cannot read the checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            convert(checkpoint, output, **options)
        assert not output.exists()
    output.mkdir()
    (output / "mine").touch()
    with pytest.raises(InputError, match="is not empty"):
        convert(path, output)
