"""Released FC-CLIP and OVSeg are converted by their names, and used; else they are refused."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from fcclip_folder import DIM, TOWERS
from fcclip_released import released_head
from ovref.errors import InputError
from ovref.exchange.checkpoints import (
    convert_fcclip,
    convert_open_mask_former,
    read_tensors,
)
from ovref_inference.proposers.config import FcClipConfig, MaskFormerConfig
from ovref_inference.proposers.fcclip import TEMPLATES, load_fcclip
from ovref_inference.proposers.mask_former import load_mask_former

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


def released_mask_former(depths=(1, 2, 1, 1), width=8, hidden=32, queries=6, layers=2):
    """Random tensors under the names of a released OVSeg with a Swin backbone."""
    torch.manual_seed(5)
    found = {}

    def pair(name, *shape):
        found[f"{name}.weight"], found[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])

    pair("backbone.patch_embed.proj", width, 3, 4, 4)
    pair("backbone.patch_embed.norm", width)
    for i, depth in enumerate(depths):
        wide = width * 2**i
        for j in range(depth):
            block = f"backbone.layers.{i}.blocks.{j}"
            pair(f"{block}.norm1", wide)
            pair(f"{block}.norm2", wide)
            pair(f"{block}.attn.qkv", 3 * wide, wide)
            pair(f"{block}.attn.proj", wide, wide)
            pair(f"{block}.mlp.fc1", 4 * wide, wide)
            pair(f"{block}.mlp.fc2", wide, 4 * wide)
            found[f"{block}.attn.relative_position_bias_table"] = torch.randn(49, 2**i)
            rows = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
            apart = rows.flatten(1)[:, :, None] - rows.flatten(1)[:, None] + 3
            found[f"{block}.attn.relative_position_index"] = apart[0] * 7 + apart[1]
        if i < 3:
            found[f"backbone.layers.{i}.downsample.reduction.weight"] = torch.randn(
                2 * wide, 4 * wide
            )
            pair(f"backbone.layers.{i}.downsample.norm", 4 * wide)
        pair(f"backbone.norm{i}", wide)
        pixel = "sem_seg_head.pixel_decoder"
        if i < 3:
            found[f"{pixel}.adapter_{i + 1}.weight"] = torch.randn(hidden, wide, 1, 1)
            pair(f"{pixel}.adapter_{i + 1}.norm", hidden)
        source = hidden if i < 3 else wide
        found[f"{pixel}.layer_{i + 1}.weight"] = torch.randn(hidden, source, 3, 3)
        pair(f"{pixel}.layer_{i + 1}.norm", hidden)
    pair(f"{pixel}.mask_features", hidden, hidden, 3, 3)
    predictor = "sem_seg_head.predictor"
    for i in range(layers):
        layer = f"{predictor}.transformer.decoder.layers.{i}"
        for name in ("self_attn", "multihead_attn"):
            found[f"{layer}.{name}.in_proj_weight"] = torch.randn(3 * hidden, hidden)
            found[f"{layer}.{name}.in_proj_bias"] = torch.randn(3 * hidden)
            pair(f"{layer}.{name}.out_proj", hidden, hidden)
        pair(f"{layer}.linear1", 40, hidden)
        pair(f"{layer}.linear2", hidden, 40)
        for number in (1, 2, 3):
            pair(f"{layer}.norm{number}", hidden)
    pair(f"{predictor}.transformer.decoder.norm", hidden)
    found[f"{predictor}.query_embed.weight"] = torch.randn(queries, hidden)
    pair(f"{predictor}.input_proj", hidden, 8 * width, 1, 1)
    for i in range(3):
        pair(f"{predictor}.mask_embed.layers.{i}", hidden, hidden)
    pair(f"{predictor}.class_embed.layers.0", 48, hidden)
    pair(f"{predictor}.class_embed.layers.1", DIM, 48)
    found["clip_adapter.non_object_embedding"] = torch.randn(1, DIM)
    found["clip_adapter.clip_model.logit_scale"] = torch.ones(())
    found["criterion.empty_weight"] = torch.ones(4)
    return found


def test_the_mask_former_of_ovseg_is_converted(tmp_path):
    tensors = released_mask_former()
    torch.save({"model": tensors}, tmp_path / "ovseg.pth")
    output = tmp_path / "open"
    found = convert_open_mask_former(tmp_path / "ovseg.pth", output, trained_names=NAMES)
    assert found["queries"] == 6
    stored = load_file(output / "model.safetensors")
    predictor = "sem_seg_head.predictor.transformer.decoder.layers.1"
    swin = "model.pixel_level_module.encoder.model.encoder.layers.1.blocks.1"
    ours = "model.transformer_module.decoder.layers.1"
    fpn = "model.pixel_level_module.decoder.fpn.layers"
    theirs = "sem_seg_head.pixel_decoder"
    for name, expected in (
        (f"{swin}.attention.self.key.weight",
         tensors["backbone.layers.1.blocks.1.attn.qkv.weight"][16:32]),
        (f"{ours}.encoder_attn.v_proj.bias",
         tensors[f"{predictor}.multihead_attn.in_proj_bias"][64:]),
        (f"{ours}.self_attn.q_proj.weight", tensors[f"{predictor}.self_attn.in_proj_weight"][:32]),
        (f"{ours}.encoder_attn_layer_norm.weight", tensors[f"{predictor}.norm2.weight"]),
        (f"{ours}.final_layer_norm.bias", tensors[f"{predictor}.norm3.bias"]),
        (f"{fpn}.0.block.0.weight", tensors[f"{theirs}.layer_3.weight"]),
        (f"{fpn}.2.proj.1.bias", tensors[f"{theirs}.adapter_1.norm.bias"]),
        ("class_predictor.2.weight", tensors["sem_seg_head.predictor.class_embed.layers.1.weight"]),
        ("void", tensors["clip_adapter.non_object_embedding"]),
    ):  # fmt: skip
        torch.testing.assert_close(stored[name], expected)
    model = load_mask_former(MaskFormerConfig(model=str(output)), device="cpu")
    (proposals,) = model.propose([np.full((64, 80, 3), 90, np.uint8)])
    assert proposals.trained_names == NAMES and proposals.open_classes.scale == 100.0
    assert proposals.open_classes.embeddings_nd.shape == (len(proposals.mask_probs_nhw), DIM)


def test_another_backbone_and_missing_tensors_of_ovseg_are_refused(tmp_path):
    tensors, path = released_mask_former(), tmp_path / "changed.pth"
    swinless = {n: v for n, v in tensors.items() if not n.startswith("backbone")}
    lacking = {n: v for n, v in tensors.items() if not n.endswith("decoder.norm.bias")}
    without = {n: v for n, v in tensors.items() if "class_embed" not in n}
    strange = tensors | {"backbone.layers.0.mood": torch.ones(1)}
    for changed, message in (
        (swinless, "has no Swin backbone"),
        (lacking, r"it lacks model\.transformer_module\.decoder\.layernorm\.bias"),
        (without, "MaskFormer is incomplete"),
        (strange, "backbone.layers.0.mood, which OVSeg's"),
    ):
        torch.save(changed, path)
        with pytest.raises(InputError, match=message):
            convert_open_mask_former(path, tmp_path / "out", trained_names=NAMES)
        assert not (tmp_path / "out").exists()


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
        checkpoint = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
        torch.save(changed, checkpoint)
        return checkpoint

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
