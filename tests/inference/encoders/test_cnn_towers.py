"""Convolutional towers against open_clip's own forward and attention with masks written out."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate, multi_head_attention_forward

from ovref_inference.encoders import clip_towers, cnn_towers, timm_towers
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import load_text_encoder, load_visual_encoder
from ovref_inference.errors import ModelError
from ovref_inference.models import resolve

RNG = np.random.default_rng(0)
TOWERS = {
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64},
    "convnext": {"timm_model_name": "convnext_atto", "timm_model_pretrained": False,
                 "timm_pool": "", "timm_proj": "mlp", "image_size": 64},
}  # fmt: skip


def awake(model):
    """The model with blocks that do something: at the start each adds next to nothing."""
    for name, values in model.named_parameters():
        if name.endswith(("bn3.weight", "gamma")):
            torch.nn.init.constant_(values, 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=TOWERS)
def model(request, tmp_path_factory):
    """A small CLIP in open_clip's layout, and its image tower."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = json.loads(Path(resolve("miniature:clip"), "open_clip_config.json").read_text())
    shutil.copytree(resolve("miniature:clip"), folder, dirs_exist_ok=True)
    settings["model_cfg"] |= {"embed_dim": 24, "vision_cfg": TOWERS[request.param]}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    clip = awake(open_clip.CLIP(**settings["model_cfg"]))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder), clip.visual


def encoder_of(folder, size_hw, **options):
    config = VisualEncoderConfig(model=folder, library="open_clip", size_hw=size_hw, **options)
    return load_visual_encoder(config, device="cpu")


def heads_of(attention, map_chw, masks_nl):
    """FC-CLIP's pooling by torch's own attention: the whole image asks, a mask's cells answer."""
    c, h, w = map_chw.shape
    side = round((len(attention.positional_embedding) - 1) ** 0.5)
    first, *_ = attention.positional_embedding
    grid = attention.positional_embedding[1:].T.reshape(1, c, side, side)
    grid = interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)[0]
    keys = (map_chw + grid).flatten(1).T[:, None]
    query = (map_chw.flatten(1).mean(1) + first).repeat(len(masks_nl), 1)[:, None]
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    found, _ = multi_head_attention_forward(
        query, keys, keys, c, attention.num_heads, None,
        torch.cat([one.bias for one in projections]), None, None, False, 0.0,
        attention.c_proj.weight, attention.c_proj.bias, training=False, need_weights=False,
        attn_mask=~masks_nl, use_separate_proj_weight=True,
        q_proj_weight=attention.q_proj.weight, k_proj_weight=attention.k_proj.weight,
        v_proj_weight=attention.v_proj.weight,
    )  # fmt: skip
    return found[:, 0]


def check_tower(visual, side):
    """The last map of the pyramid, led through the tower's own end, is the tower's own output."""
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    maps = cnn_towers.pyramid(visual, pixels)
    for found, width, stride in zip(
        maps, cnn_towers.widths(visual), cnn_towers.STRIDES, strict=True
    ):
        assert found.shape == (2, width, side // stride, side // stride)
    expected = visual(pixels)
    scale = expected.abs().max()
    grid_hw = maps[-1].shape[-2:]
    if cnn_towers.is_resnet(visual):
        attention = visual.attnpool
        torch.testing.assert_close(attention(maps[-1]), expected)
        # open_clip's pool also attends to the mean of the cells, as to one cell more.
        positions = torch.cat(
            [attention.positional_embedding[:1], cnn_towers.cell_positions(attention, grid_hw)]
        )
        for map_chw, one in zip(maps[-1], expected, strict=True):
            cells = map_chw.flatten(1).T
            with_mean = torch.cat([cells.mean(0, keepdim=True), cells]) + positions
            found = cnn_towers.attention_pooled(
                attention, with_mean, torch.ones(1, len(with_mean)), positions
            )
            torch.testing.assert_close(found[0] / scale, one / scale, atol=1e-5, rtol=1e-4)
        cells, head, pool = cnn_towers.resnet_features(visual, tuple(grid_hw))
        masks = torch.rand(5, grid_hw.numel(), generator=torch.Generator().manual_seed(2)) < 0.4
        masks[:, 0] = True
        found = pool(cells(pixels)[0], masks.float(), tuple(grid_hw))
        torch.testing.assert_close(
            found / scale, heads_of(attention, maps[-1][0], masks) / scale, atol=1e-5, rtol=1e-4
        )
        single = torch.eye(grid_hw.numel())[:3]
        dense = head(cells(pixels))[0, :3]
        found = pool(cells(pixels)[0], single, tuple(grid_hw))
        torch.testing.assert_close(found / scale, dense / scale, atol=1e-5, rtol=1e-4)
    else:
        cells, head = timm_towers.features(visual.trunk), cnn_towers.trunk_head(visual)
        found = cells(pixels)
        torch.testing.assert_close(found, maps[-1].flatten(2).transpose(1, 2))
        torch.testing.assert_close(head(found.mean(1)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_towers_are_open_clips(model):
    check_tower(model[1], 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "widths"),
    [
        ("convnext_large_d_320", 320, [192, 384, 768, 1536]),
        ("RN50", 224, [256, 512, 1024, 2048]),
        ("RN50x64", 448, [512, 1024, 2048, 4096]),
    ],
)
@torch.no_grad()
def test_towers_of_full_size_are_open_clips(name, side, widths):
    settings = open_clip.get_model_config(name)
    vision = {**settings["vision_cfg"], "timm_model_pretrained": False}
    tower = open_clip.model._build_vision_tower(settings["embed_dim"], vision)
    assert cnn_towers.widths(tower) == widths and clip_towers.cell_pixels(tower) == 32
    check_tower(awake(tower), side)


@torch.no_grad()
def test_regions_of_an_encoder_are_pooled_by_attention(model):
    folder, visual = model
    encoder = encoder_of(folder, (100, 130))
    assert (encoder.size_hw, encoder.grid_hw, encoder.patch_size) == ((96, 128), (3, 4), 32)
    assert encoder.dim == 24 == load_text_encoder(TextEncoderConfig(model=folder)).dim
    images = [RNG.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(2)]
    masks = np.zeros((5, 96, 128), bool)
    masks[0, :32, 64:] = True  # the last two cells of the first row
    masks[1, 64:, :32] = True  # the first cell of the last row
    masks[2, :, :16] = True  # half of each cell of the first column
    masks[3, :, :32] = True  # the same cells, whole
    found = encoder.encode_regions(images, [masks, masks[:0]])
    assert found[0][1].tolist() == [True] * 4 + [False] and not found[0][0][4].any()
    assert found[1][0].shape == (0, 24)
    dense = encoder.encode(images)
    np.testing.assert_allclose(found[0][0][1], dense[0, 2, 0], atol=1e-4)
    np.testing.assert_allclose(found[0][0][2], found[0][0][3], atol=1e-4)
    alone = encoder.encode_regions(images, [masks[2:3], masks[:0]])
    np.testing.assert_allclose(alone[0][0][0], found[0][0][2], atol=1e-6)
    if cnn_towers.is_resnet(visual):
        config = json.loads(Path(folder, "open_clip_config.json").read_text())["preprocess_cfg"]
        pixels = (images[0] / 255.0 - config["mean"]) / config["std"]
        pixels = torch.tensor(pixels.transpose(2, 0, 1)[None]).float()
        cells = torch.zeros(2, 12, dtype=torch.bool)
        cells[0, [2, 3]] = cells[1, [0, 4, 8]] = True
        expected = heads_of(visual.attnpool, cnn_towers.pyramid(visual, pixels)[-1][0], cells)
        np.testing.assert_allclose(found[0][0][[0, 2]], expected, atol=1e-4)


@torch.no_grad()
def test_images_that_keep_their_aspect_are_encoded_as_at_their_size(model):
    folder, _ = model
    encoder = encoder_of(folder, (64, 128), aspect="kept")
    sizes = {(64, 64): (64, 64), (60, 130): (59, 128), (200, 110): (116, 64)}
    images = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    masks = [np.zeros((1, *size), bool) for size in sizes]
    for mask in masks:
        mask[0, : mask.shape[1] // 2, 10:] = True
    found = encoder.encode_regions(images, masks), encoder.encode(images)
    for number, (image, mask, size) in enumerate(zip(images, masks, sizes.values(), strict=True)):
        alone = encoder_of(folder, size)
        assert alone.grid_hw == encoder.grid_of(image.shape[:2])
        wanted = alone.encode_regions([image], [mask])[0][0]
        np.testing.assert_allclose(found[0][number][0], wanted, atol=1e-4)
        np.testing.assert_allclose(found[1][number], alone.encode([image])[0], atol=1e-4)


def test_a_mask_that_covers_parts_of_cells_is_their_mean_where_attention_is_even():
    """With keys that do not matter the pool is the mean of values, weighted by coverage."""
    attention = open_clip.modified_resnet.AttentionPool2d(2, 16, 4, 6)
    torch.nn.init.zeros_(attention.k_proj.weight)
    map_lc, weights = torch.randn(4, 16), torch.tensor([[0.5, 0.0, 1.0, 0.25]])
    with torch.no_grad():
        found = cnn_towers.attention_pooled(attention, map_lc, weights, torch.zeros(4, 16))
        mean = (weights @ map_lc) / weights.sum()
        torch.testing.assert_close(found, attention.c_proj(attention.v_proj(mean)))


def test_a_convolutional_tower_has_no_values(model):
    config = VisualEncoderConfig(model=model[0], library="open_clip", features="values")
    with pytest.raises(ModelError, match="has no values"):
        load_visual_encoder(config, device="cpu")
