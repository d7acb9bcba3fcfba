"""Vision transformers of transformers: every family against its own model and image processor."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from ovref_inference import ModelError
from ovref_inference.encoders.load import VisualEncoderConfig, load_visual_encoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
         "intermediate_size": 64, "image_size": 32}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 50}  # fmt: skip
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(2)]


def saved(folder, model, **processor):
    """The model's folder with an image processor whose defaults change nothing else."""
    model.save_pretrained(folder)
    plain = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 48}}
    (folder / "preprocessor_config.json").write_text(json.dumps(plain | processor))
    return model.eval()


def load(folder, size_hw=(32, 48), **options):
    config = VisualEncoderConfig(model=str(folder), size_hw=size_hw, **options)
    return load_visual_encoder(config, device="cpu", batch_size=2)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"do_resize": False},
        {"size": {"shortest_edge": 32}, "do_center_crop": False},
    ],
    ids=str,
)
def test_preprocessing_is_that_of_the_image_processor(fields, tmp_path):
    torch.manual_seed(0)
    model = saved(tmp_path, ViTModel(ViTConfig(**SIZES), add_pooling_layer=False), **fields)
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    pixels = processor(IMAGES, return_tensors="pt", input_data_format="channels_last").pixel_values
    assert pixels.shape == (2, 3, 32, 48)
    with torch.no_grad():
        tokens = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    expected = tokens[:, 1:].reshape(2, 4, 6, -1).numpy()
    np.testing.assert_allclose(load(tmp_path).encode(IMAGES), expected, atol=1e-4)


@pytest.mark.parametrize("resample", [2, 3])
def test_images_are_resized_as_the_image_processor_does(resample, tmp_path):
    torch.manual_seed(0)
    model = saved(tmp_path, ViTModel(ViTConfig(**SIZES), add_pooling_layer=False),
                  resample=resample)  # fmt: skip
    smooth = np.kron(RNG.integers(0, 256, (7, 9, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    pixels = processor(smooth, return_tensors="pt", input_data_format="channels_last").pixel_values
    with torch.no_grad():
        tokens = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    expected = tokens[0, 1:].reshape(4, 6, -1).numpy()
    # The image processor rounds what it resized to whole numbers.
    np.testing.assert_allclose(load(tmp_path).encode([smooth])[0], expected, atol=0.05)


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"resample": 1}, "resample"),
        ({"resample": 0}, "resample"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"do_grayscale": True}, "do_grayscale"),
        ({"rescale_offset": True}, "rescale_offset"),
        ({"image_mean": [0.5, 0.5]}, "image"),
    ],
    ids=str,
)
def test_other_preprocessing_is_refused(fields, found, tmp_path):
    saved(tmp_path, ViTModel(ViTConfig(**SIZES)), **fields)
    with pytest.raises(ModelError, match=found):
        load(tmp_path)


def clip_tokens(model, pixels):
    vision = getattr(model, "vision_model", model)
    states = vision(pixels, interpolate_pos_encoding=True).last_hidden_state
    return vision.post_layernorm(states)[:, 1:]


def unmasked_mae(model, pixels):
    model.config.mask_ratio = 0.0
    order = torch.arange(24.0).expand(len(pixels), -1)
    states = model(pixels, noise=order, interpolate_pos_encoding=True).last_hidden_state
    return states[:, 1:]


def after(prefix):
    return lambda model, pixels: getattr(model, "vision_model", model)(
        pixels, interpolate_pos_encoding=True
    ).last_hidden_state[:, prefix:]


FAMILIES = {
    "clip vision": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)), clip_tokens),
    "clip": (
        lambda: CLIPModel(CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=8)),
        clip_tokens,
    ),
    "siglip": (lambda: SiglipModel(SiglipConfig(vision_config=SIZES, text_config=TEXT)), after(0)),
    "deit": (lambda: DeiTModel(DeiTConfig(**SIZES), add_pooling_layer=False), after(2)),
    "mae": (lambda: ViTMAEModel(ViTMAEConfig(**SIZES)), unmasked_mae),
    "ijepa": (lambda: IJepaModel(IJepaConfig(**SIZES), add_pooling_layer=False), after(0)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_keys_of_other_families_at_another_size(family, tmp_path):
    torch.manual_seed(0)
    make, patches = FAMILIES[family]
    model = saved(tmp_path, make())
    pixels = torch.tensor(np.stack(IMAGES)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = patches(model, pixels).reshape(2, 4, 6, -1).numpy()
    encoder = load(tmp_path)
    assert encoder.dim == 32
    np.testing.assert_allclose(encoder.encode(IMAGES), expected, atol=1e-4)
    assert load(tmp_path, features="keys").encode(IMAGES).shape == (2, 4, 6, 32)


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda: SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=(1, 1),
                                      num_heads=(1, 2), window_size=4)),
         r"SwinModel.*not supported.*\(1, 96, 'width'\).*found \(1, 23, 16\).*works"),
        (lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
         "type 'resnet', which has no patches"),
    ],
    ids=["swin", "resnet"],
)  # fmt: skip
def test_models_that_are_no_vit_are_refused_when_they_are_loaded(make, found, tmp_path):
    saved(tmp_path, make())
    with pytest.raises(ModelError, match=found):
        load(tmp_path)


def test_joint_models_that_are_not_known_are_refused_by_name(tmp_path):
    config = transformers.BlipConfig(vision_config=SIZES, text_config=TEXT | {"bos_token_id": 1})
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="type 'blip', which has no patches"):
        load(tmp_path)


def test_without_the_type_of_its_image_processor_a_model_is_refused_in_one_sentence(tmp_path):
    model = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=1)
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    with pytest.raises(ModelError, match="image_processor_type") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 700


def test_weights_that_give_no_finite_values_are_refused(tmp_path):
    model = ViTModel(ViTConfig(**SIZES))
    with torch.no_grad():
        model.layernorm.weight.fill_(torch.nan)
    saved(tmp_path, model)
    with pytest.raises(ModelError, match="not finite"):
        load(tmp_path)
