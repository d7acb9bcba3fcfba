"""Encoders on the miniature's models: geometry, preprocessing, and slow references."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from ovref_inference import ModelError
from ovref_inference.encoders.crops import masked_crop
from ovref_inference.encoders.load import (
    TextEncoderConfig,
    VisualEncoderConfig,
    load_region_encoder,
    load_text_encoder,
    load_visual_encoder,
)
from ovref_inference.encoders.pooling import pool_regions
from ovref_inference.models import resolve
from ovref_inference.pixels import BatchSize, batched

RNG = np.random.default_rng(0)
IMAGES = [
    RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8),
    RNG.integers(0, 256, (50, 90, 3), dtype=np.uint8),
    np.zeros((1, 1, 3), dtype=np.uint8),
]
CASES = {
    "dinov2": {"model": "miniature:dinov2"},
    "dino": {"model": "miniature:dino"},
    "dino keys": {"model": "miniature:dino", "features": "keys"},
    "clip": {"model": "miniature:clip", "library": "open_clip"},
    "clip values": {"model": "miniature:clip", "library": "open_clip", "features": "values"},
}


def load(size_hw=(64, 64), **options):
    return load_visual_encoder(VisualEncoderConfig(size_hw=size_hw, **options), device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_independence_of_the_batch(case):
    encoder = load(**CASES[case])
    patch = 8 if "clip" in case else 4
    features = encoder.encode(IMAGES)
    assert encoder.grid_hw == (64 // patch, 64 // patch)
    assert features.shape == (3, *encoder.grid_hw, encoder.dim) and features.dtype == np.float32
    assert np.isfinite(features).all()
    for row, image in enumerate(IMAGES):
        np.testing.assert_allclose(encoder.encode([image])[0], features[row], atol=1e-4)
    assert encoder.encode([]).shape == (0, *encoder.grid_hw, encoder.dim)


@pytest.mark.parametrize("case", CASES)
def test_other_sizes_round_to_the_patch_and_interpolate_positions(case):
    encoder = load(size_hw=(31, 97), **CASES[case])
    patch = encoder.patch_size
    assert encoder.size_hw == (round(31 / patch) * patch, round(97 / patch) * patch)
    features = encoder.encode(IMAGES[:2])
    assert features.shape == (2, *encoder.grid_hw, encoder.dim) and np.isfinite(features).all()


def test_dinov2_tokens_are_those_of_the_plain_model():
    model = AutoModel.from_pretrained(resolve("miniature:dinov2"), dtype=torch.float32).eval()
    settings = json.loads(Path(resolve("miniature:dinov2"), "preprocessor_config.json").read_text())
    pixels = (IMAGES[0] / 255.0 - settings["image_mean"]) / settings["image_std"]
    with torch.no_grad():
        tokens = model(torch.tensor(pixels.transpose(2, 0, 1)[None]).float()).last_hidden_state
    expected = tokens[0, 1:].reshape(16, 16, -1).numpy()
    found = load(**CASES["dinov2"]).encode(IMAGES[:1])[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_dino_keys_are_the_last_layers_projection_of_its_normed_input():
    model = AutoModel.from_pretrained(
        resolve("miniature:dino"), dtype=torch.float32, add_pooling_layer=False
    ).eval()
    encoder = load(model="miniature:dino", features="keys")
    settings = json.loads(Path(resolve("miniature:dino"), "preprocessor_config.json").read_text())
    pixels = (IMAGES[0] / 255.0 - settings["image_mean"]) / settings["image_std"]
    with torch.no_grad():
        found = model(
            torch.tensor(pixels.transpose(2, 0, 1)[None]).float(), output_hidden_states=True
        )
        state = dict(model.named_parameters())
        name = next(n for n in reversed(state) if n.endswith(("k_proj.weight", "key.weight")))
        prefix = name.split(".attention.")[0]
        normed = torch.nn.functional.layer_norm(
            found.hidden_states[-2],
            (96,),
            state[f"{prefix}.layernorm_before.weight"],
            state[f"{prefix}.layernorm_before.bias"],
            model.config.layer_norm_eps,
        )
        keys = normed @ state[name].T + state[name.replace("weight", "bias")]
    expected = keys[0, 1:].reshape(16, 16, -1).numpy()
    np.testing.assert_allclose(encoder.encode(IMAGES[:1])[0], expected, atol=1e-3)


def clip_parts():
    import open_clip

    model = open_clip.create_model(f"local-dir:{resolve('miniature:clip')}").eval()
    settings = model.visual.preprocess_cfg
    pixels = (IMAGES[0] / 255.0 - np.array(settings["mean"])) / np.array(settings["std"])
    return model, torch.tensor(pixels.transpose(2, 0, 1)[None]).float()


def test_clip_tokens_live_in_the_joint_space():
    """The class token, taken through the same norm and projection, is the image's embedding."""
    model, pixels = clip_parts()
    with torch.no_grad():
        model.visual.output_tokens = True
        pooled, tokens = model.visual(pixels)
        expected = (tokens @ model.visual.proj)[0].reshape(8, 8, -1).numpy()
    np.testing.assert_allclose(load(**CASES["clip"]).encode(IMAGES[:1])[0], expected, atol=1e-4)
    embedding = load_text_encoder(TextEncoderConfig(model="miniature:clip"), device="cpu")
    whole = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    np.testing.assert_allclose(embedding.encode_images(IMAGES[:1]), whole, atol=1e-4)


def test_clip_values_are_attention_to_oneself():
    """An attention mask that leaves only the diagonal gives what the value path gives."""
    model, pixels = clip_parts()
    visual = model.visual
    with torch.no_grad():
        state = visual._embeds(pixels)
        for block in visual.transformer.resblocks[:-1]:
            state = block(state)
        alone = torch.full((state.shape[1],) * 2, -torch.inf).fill_diagonal_(0)
        state = visual.transformer.resblocks[-1](state, attn_mask=alone)
        expected = (visual.ln_post(state) @ visual.proj)[0, 1:].reshape(8, 8, -1).numpy()
    features = load(**CASES["clip values"]).encode(IMAGES[:1])[0]
    np.testing.assert_allclose(features, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["registers", "dinov3"])
def test_class_and_register_tokens_are_left_out(family, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    if family == "registers":
        settings = Dinov2WithRegistersConfig(**shape, image_size=32, num_register_tokens=4)
        model = Dinov2WithRegistersModel(settings)
    else:
        settings = DINOv3ViTConfig(
            **shape, intermediate_size=64, image_size=32, num_register_tokens=4
        )
        model = DINOv3ViTModel(settings)
    model.save_pretrained(tmp_path)
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    plain["image_processor_type"] = "ViTImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(plain))
    encoder = load(model=str(tmp_path), size_hw=(32, 48))
    image = np.zeros((32, 48, 3), dtype=np.uint8)
    with torch.no_grad():
        tokens = model.eval()(torch.zeros(1, 3, 32, 48)).last_hidden_state
    assert tokens.shape[1] == 1 + 4 + 4 * 6
    expected = tokens[0, 5:].reshape(4, 6, -1).numpy()
    np.testing.assert_allclose(encoder.encode([image])[0], expected, atol=1e-5)
    keys = load(model=str(tmp_path), size_hw=(32, 48), features="keys")
    assert keys.encode([image]).shape == (1, 4, 6, 32)


def test_texts_are_normalised_and_over_long_ones_lose_their_end():
    config = TextEncoderConfig(model="miniature:clip")
    encoder = load_text_encoder(config, device="cpu", batch_size=2)
    texts = ["a red boat", "grass", "a boat " * 200, "a boat " * 300, ""]
    embeddings = encoder.encode(texts)
    assert embeddings.shape == (5, encoder.dim) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(embeddings[2], embeddings[3], atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts[:1])[0], embeddings[0], atol=1e-5)
    assert not np.allclose(embeddings[0], embeddings[1], atol=1e-3)
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_keys_are_those_of_the_own_call_in_several_threads():
    config = VisualEncoderConfig(model="miniature:dino", size_hw=(64, 64), features="keys")
    encoder = load_visual_encoder(config, device="cpu")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(40)]
    expected = [encoder.encode([image]) for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: encoder.encode([image]), images))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4), np.uint8), ((4, 4, 3), np.float32), ((4, 4, 4), np.uint8)]
)
def test_other_arrays_are_no_images(shape, dtype):
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        load(**CASES["dinov2"]).encode([np.zeros(shape, dtype)])


@pytest.mark.parametrize(
    "options",
    [
        {"model": ""},
        {"model": "x", "size_hw": (0, 4)},
        {"model": "x", "library": "timm", "features": "values"},
        {"model": "x", "library": "open_clip", "features": "keys"},
        {"model": "x", "features": "crop_none"},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"model|size_hw|features"):
        VisualEncoderConfig(**options)


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    for options in (
        {"model": str(tmp_path)},
        {"model": str(tmp_path), "library": "open_clip"},
        {"model": "miniature:nothing"},
        {"model": "ViT-B-32:no-such-tag", "library": "open_clip"},
        {"model": "no-such-folder", "library": "open_clip"},
    ):
        with pytest.raises(ModelError, match=options["model"].removeprefix("miniature:")):
            load(**options)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "dinov2"
    shutil.copytree(resolve("miniature:dinov2"), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[-1])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        load(model=str(folder))


def test_pickled_weights_are_refused(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(resolve("miniature:clip"), folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"a": 1}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_text_encoder(TextEncoderConfig(model=str(folder)))


@pytest.mark.parametrize(("batch_size", "passes"), [(None, [2, 2, 1]), (4, [4, 1])])
def test_passes_on_a_cpu_are_bounded_by_pixels(batch_size, passes, monkeypatch):
    monkeypatch.setattr("ovref_inference.encoders.load.CPU_PIXELS", 2 * 64 * 64 + 1)
    config = VisualEncoderConfig(size_hw=(64, 64), **CASES["dinov2"])
    encoder = load_visual_encoder(config, device="cpu", batch_size=batch_size)
    forward, seen = encoder.forward, []
    encoder.forward = lambda pixels: (seen.append(len(pixels)), forward(pixels))[1]
    images = [np.roll(IMAGES[0], step, axis=1) for step in range(5)]
    found = encoder.encode(images)
    assert seen == passes
    each = [load(**CASES["dinov2"]).encode([image])[0] for image in images]
    np.testing.assert_allclose(found, each, atol=1e-4)


def test_an_image_of_more_pixels_than_a_pass_goes_alone(monkeypatch):
    monkeypatch.setattr("ovref_inference.encoders.load.CPU_PIXELS", 1)
    found = load(**CASES["dino keys"]).encode(IMAGES)
    assert found.shape == (3, 16, 16, load(**CASES["dino keys"]).dim)


def test_out_of_memory_halves_the_batch():
    sizes = []

    def run(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.cuda.OutOfMemoryError("too many")
        return np.array(items)

    assert np.concatenate(batched(list(range(7)), 8, run)).tolist() == list(range(7))
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]

    sizes.clear()
    remembered = BatchSize(4)
    for _ in range(2):
        batched(list(range(4)), remembered, run)
    assert sizes == [4, 2, 2, 2, 2]

    def never(items):
        raise torch.cuda.OutOfMemoryError("too many")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        batched([1, 2], 2, never)


def tiny_convnext(folder, proj="mlp"):
    """A CLIP with timm's smallest ConvNeXt, random but seeded, in open_clip's layout."""
    import open_clip
    from safetensors.torch import save_file

    settings = json.loads(Path(resolve("miniature:clip"), "open_clip_config.json").read_text())
    shutil.copytree(resolve("miniature:clip"), folder, dirs_exist_ok=True)
    settings["model_cfg"]["embed_dim"] = 24
    settings["model_cfg"]["vision_cfg"] = {
        "timm_model_name": "convnext_atto",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": proj,
        "image_size": 64,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    model = open_clip.CLIP(**settings["model_cfg"]).eval()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    return tiny_convnext(tmp_path_factory.mktemp("convnext"))


def whole(image):
    return np.ones((1, *image.shape[:2]), bool)


@pytest.mark.parametrize("proj", ["mlp", "linear"])
def test_a_convnext_region_of_the_whole_image_is_the_images_embedding(proj, tmp_path):
    """FC-CLIP: what is pooled over everything and led through the head is CLIP's own embedding."""
    model = tiny_convnext(tmp_path, proj)
    encoder = load(model=model, library="open_clip")
    text = load_text_encoder(TextEncoderConfig(model=model), device="cpu")
    assert (encoder.dim, text.dim, encoder.patch_size) == (24, 24, 32)
    found = encoder.encode_regions(IMAGES, [whole(image) for image in IMAGES])
    regions = np.concatenate([features for features, valid in found])
    assert all(valid.all() for _, valid in found)
    regions /= np.linalg.norm(regions, axis=1, keepdims=True)
    np.testing.assert_allclose(regions, text.encode_images(IMAGES), atol=1e-5)
    assert text.encode(["a boat"]).shape == (1, 24)


def test_convnext_regions_are_pooled_before_the_head(convnext):
    """A slow way for any input size: trunk, mean of the cells, norm and projection by hand."""
    encoder = load(model=convnext, library="open_clip", size_hw=(100, 130))
    assert encoder.size_hw == (96, 128) and encoder.grid_hw == (3, 4)
    image = RNG.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    mask = np.zeros((2, 96, 128), bool)
    mask[0, :32, 64:128] = True  # the last two cells of the first row
    mask[1, 64:, :32] = True  # the first cell of the last row
    import open_clip

    visual = open_clip.create_model(f"local-dir:{convnext}").eval().visual
    settings = visual.preprocess_cfg
    pixels = (image / 255.0 - settings["mean"]) / settings["std"]
    with torch.no_grad():
        trunk = visual.trunk
        cells = trunk.norm_pre(
            trunk.stages(trunk.stem(torch.tensor(pixels.transpose(2, 0, 1)[None]).float()))
        )[0]
        pooled = torch.stack([(cells[:, 0, 2] + cells[:, 0, 3]) / 2, cells[:, 2, 0]])
        norm = trunk.head.norm
        normed = torch.nn.functional.layer_norm(
            pooled, norm.weight.shape, norm.weight, norm.bias, norm.eps
        )
        expected = visual.head(normed).numpy()
    ((regions, valid),) = encoder.encode_regions([image], [mask])
    assert valid.all()
    np.testing.assert_allclose(regions, expected, atol=1e-5)
    # One cell alone is what the dense map has there.
    np.testing.assert_allclose(encoder.encode([image])[0, 2, 0], expected[1], atol=1e-5)


def test_empty_masks_and_no_masks_of_every_kind_of_region(convnext):
    cases = [*CASES.values(), {"model": convnext, "library": "open_clip"}]
    cases += [
        {"model": model, "library": "open_clip", "features": "crop_binary"}
        for model in ("miniature:clip", convnext)
    ]
    image = IMAGES[0]
    masks = np.zeros((3, 64, 64), bool)
    masks[1, 10:20, 30:50] = True
    for options in cases:
        encoder = load_region_encoder(
            VisualEncoderConfig(size_hw=(64, 64), **options), device="cpu"
        )
        some, none = encoder.encode_regions([image, image], [masks, masks[:0]])
        assert some[1].tolist() == [False, True, False]
        assert some[0].shape == (3, encoder.dim) and some[0].dtype == np.float32
        assert not some[0][[0, 2]].any() and some[0][1].any()
        assert none[0].shape == (0, encoder.dim) and none[1].shape == (0,)
        tri_state = np.where(masks, np.uint8(255), np.uint8(128))
        ((same, valid),) = encoder.encode_regions([image], [tri_state])
        np.testing.assert_array_equal(valid, some[1])
        np.testing.assert_allclose(same, some[0], atol=1e-5)
        assert encoder.encode_regions([], []) == []


@pytest.mark.parametrize("case", CASES)
def test_a_region_is_pooled_as_everywhere_and_alone(case):
    encoder = load(**CASES[case])
    masks = RNG.random((4, 64, 64)) < 0.3
    ((found, valid),) = encoder.encode_regions(IMAGES[:1], [masks])
    expected, _ = pool_regions(encoder.encode(IMAGES[:1])[0], masks)
    assert valid.all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    ((alone, _),) = encoder.encode_regions(IMAGES[:1], [masks[2:3]])
    np.testing.assert_array_equal(alone[0], found[2])


@pytest.mark.parametrize("masking", ["binary", "heatmap", "none", "heatmap_black"])
def test_crops_are_encoded_as_images_of_their_own(masking):
    """The crop made by hand, resized, through CLIP: in the order of masks, over several images."""
    config = VisualEncoderConfig(
        model="miniature:clip",
        library="open_clip",
        size_hw=(64, 64),
        features=f"crop_{masking}",
    )
    encoder = load_region_encoder(config, device="cpu", batch_size=2)
    images = IMAGES[:2]
    masks = [np.zeros((2, *image.shape[:2]), bool) for image in images]
    heatmaps = [RNG.random(m.shape) for m in masks]
    for m in masks:
        m[0, 5:31, 7:40] = RNG.random((26, 33)) < 0.6
        m[1, 20:, 30:] = True
    found = encoder.encode_regions(images, masks, heatmaps)
    text = load_text_encoder(TextEncoderConfig(model="miniature:clip"), device="cpu")
    for i, (features, valid) in enumerate(found):
        crops = [
            masked_crop(
                images[i],
                masks[i][j],
                masking.removesuffix("_black"),
                heatmap_hw=heatmaps[i][j],
                # The miniature's own mean, or the paper's product of pixels and heatmap.
                fill_rgb=(0, 0, 0) if masking.endswith("black") else (127.5, 127.5, 127.5),
            )
            for j in range(2)
        ]
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        assert valid.all()
        np.testing.assert_allclose(unit, text.encode_images(crops), atol=1e-5)


def test_heatmap_crops_need_heatmaps_and_crops_are_not_dense():
    config = VisualEncoderConfig(
        model="miniature:clip", library="open_clip", size_hw=(64, 64), features="crop_heatmap"
    )
    encoder = load_region_encoder(config, device="cpu")
    with pytest.raises(ValueError, match="needs the region's heatmap_hw"):
        encoder.encode_regions(IMAGES[:1], [whole(IMAGES[0])])
    with pytest.raises(ModelError, match="load_region_encoder"):
        load_visual_encoder(config, device="cpu")
    assert config.masking == "heatmap"
    assert VisualEncoderConfig(model="x").masking is None


RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
TIMM_RESNET = {
    "image_size": 64, "timm_model_name": "resnet10t", "timm_model_pretrained": False,
    "timm_pool": "rot_attn", "timm_proj": "",
}  # fmt: skip


def clip_with(folder, tower):
    """A CLIP with another image tower, in open_clip's layout."""
    import open_clip
    from safetensors.torch import save_file

    settings = json.loads(Path(resolve("miniature:clip"), "open_clip_config.json").read_text())
    shutil.copytree(resolve("miniature:clip"), folder, dirs_exist_ok=True)
    settings["model_cfg"]["vision_cfg"] = tower
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    model = open_clip.CLIP(**settings["model_cfg"]).eval()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def test_crops_need_no_dense_features(tmp_path):
    model = clip_with(tmp_path / "resnet", RESNET)
    options = {"model": model, "library": "open_clip", "features": "crop_none"}
    encoder = load_region_encoder(VisualEncoderConfig(size_hw=(64, 64), **options), device="cpu")
    ((features, valid),) = encoder.encode_regions(IMAGES[:1], [whole(IMAGES[0])])
    text = load_text_encoder(TextEncoderConfig(model=model), device="cpu")
    assert valid.all() and encoder.dim == text.dim
    unit = features / np.linalg.norm(features)
    np.testing.assert_allclose(unit, text.encode_images(IMAGES[:1]), atol=1e-5)
    other = clip_with(tmp_path / "other", TIMM_RESNET)
    with pytest.raises(ModelError, match=r"TimmModel with timm ResNet.*features 'crop_binary'"):
        load(model=other, library="open_clip")
    # Its attention pool is for one size alone: seen at once, not in the middle of a build.
    with pytest.raises(ModelError, match="on images of 96 x 96 pixels"):
        load_region_encoder(VisualEncoderConfig(size_hw=(96, 96), **options), device="cpu")


@pytest.mark.parametrize("changes", [{"interpolation": "random"}, {"mode": "BGR"}], ids=str)
def test_preprocessing_of_open_clip_that_is_not_supported_is_refused(changes, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(resolve("miniature:clip"), folder)
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings.setdefault("preprocess_cfg", {}).update(changes)
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="RGB"):
        load_text_encoder(TextEncoderConfig(model=str(folder)), device="cpu")
    with pytest.raises(ModelError, match="RGB"):
        load(model=str(folder), library="open_clip")


def test_a_convnext_has_no_values(convnext):
    with pytest.raises(ModelError, match="no ViT"):
        load(model=convnext, library="open_clip", features="values")
