"""Every encoder of the table, with random weights of a tiny network of its real class, against its
own library."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from ovref.known_models import own_forward
from ovref.known_models.random_weights import write
from ovref.known_models.table import ENCODERS, find
from ovref_inference.encoders.load import (
    TextEncoderConfig,
    VisualEncoderConfig,
    load_text_encoder,
    load_visual_encoder,
)
from ovref_inference.errors import ModelError

IDS = [known.model for known in ENCODERS]
TEXTS = ["a photo of a Tree", "the red boat", "a b c " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(known):
        if known.model not in made:
            made[known.model] = write(known, tmp_path_factory.mktemp("model"), tiny=True)
        return str(made[known.model])

    return of


@lru_cache
def loaded(config):
    return load_visual_encoder(config, device="cpu", batch_size=2)


def encoder(known, folder, size_hw=(100, 157), **options):
    config = VisualEncoderConfig(
        model=folder(known), library=known.library, size_hw=size_hw, **options
    )
    return config, loaded(config)


def noise(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


@pytest.mark.parametrize("known", ENCODERS, ids=IDS)
def test_dense_features_are_those_of_the_library(known, folder):
    """At a size that is not square and not the model's own; the grid's rows are the image's."""
    config, loaded = encoder(known, folder)
    cell = loaded.patch_size
    assert loaded.size_hw == (round(100 / cell) * cell, round(157 / cell) * cell)
    image = noise(loaded.size_hw)
    expected = own_forward.dense(config, image, cell)
    assert expected.shape == (*loaded.grid_hw, loaded.dim)
    found = loaded.encode([image, noise(loaded.size_hw, 1)])
    scale = np.abs(expected).max()
    assert scale > 0.01 and expected.std((0, 1)).max() > 1e-3 * scale
    np.testing.assert_allclose(found[0], expected, atol=2e-5 * scale)
    assert not np.allclose(found[0], found[1], atol=1e-3 * scale)


@pytest.mark.parametrize("known", ENCODERS, ids=IDS)
def test_bfloat16_is_near_float32(known, folder):
    _, exact = encoder(known, folder)
    _, rough = encoder(known, folder, precision="bfloat16")
    image = noise(exact.size_hw)
    a, b = (each.encode([image]).reshape(-1, exact.dim) for each in (exact, rough))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.99


TEXT_IDS = [known for known in ENCODERS if "text" in known.roles]


@pytest.mark.parametrize("known", TEXT_IDS, ids=[known.model for known in TEXT_IDS])
def test_texts_are_embedded_as_by_the_library(known, folder):
    config = TextEncoderConfig(model=folder(known), library=known.library)
    loaded = load_text_encoder(config, device="cpu", batch_size=2)
    found, expected = loaded.encode(TEXTS), own_forward.embeddings(config, TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.shape == (3, loaded.dim) and abs(found[0] @ found[1]) < 0.9999
    images = loaded.encode_images([noise((50, 90))])
    assert images.shape == (1, loaded.dim) and np.isfinite(images).all()
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)


JOINT = [known for known in ENCODERS if known.joint]


@pytest.mark.parametrize("known", JOINT, ids=[known.model for known in JOINT])
def test_values_are_in_the_space_of_texts(known, folder):
    _, loaded = encoder(known, folder, features="values")
    text = load_text_encoder(TextEncoderConfig(model=folder(known), library=known.library))
    assert loaded.dim == text.dim
    values = loaded.encode([noise(loaded.size_hw)])
    # What a patch is does not depend on the others beyond the layers before the last.
    assert np.isfinite(values).all() and values.std((0, 1, 2)).max() > 1e-4


VIT = [known for known in ENCODERS if known.keys and known.library != "open_clip"]


@pytest.mark.parametrize("known", VIT, ids=[known.model for known in VIT])
def test_keys_and_layers(known, folder):
    _, last = encoder(known, folder)
    _, keys = encoder(known, folder, features="keys")
    _, same = encoder(known, folder, layer=2)
    _, first = encoder(known, folder, layer=-3)
    image = noise(last.size_hw)
    assert keys.encode([image]).shape == (1, *last.grid_hw, 32)
    np.testing.assert_array_equal(same.encode([image]), last.encode([image]))
    assert not np.allclose(first.encode([image]), last.encode([image]), atol=1e-2)
    with pytest.raises(ModelError, match="has 3 layers: layer must be -3 to 2, found 3"):
        encoder(known, folder, layer=3)


DINOV3, RADIO, SIGLIP = (
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "nvidia/C-RADIOv3-L",
    "ViT-L-16-SigLIP2-256:webli",
)


def test_what_cannot_be_used_says_what_works(folder, tmp_path):
    for model, options, reason in (
        (DINOV3, {"precision": "float16"}, "overflows in float16.*bfloat16 or float32 works"),
        ("timm/vit_large_patch16_dinov3.lvd1689m", {"precision": "float16"}, "bfloat16"),
        (DINOV3, {"features": "values"}, "DINOv3ViTModel.*space of texts.*'tokens' work"),
        ("facebook/dinov3-convnext-large-pretrain-lvd1689m", {"layer": -2}, "layer -1 works"),
        ("MobileCLIP2-S0:dfndr2b", {"features": "values"}, "features 'tokens' are"),
    ):
        with pytest.raises(ModelError, match=reason):
            encoder(find(model), folder, **options)
    twice = shutil.copytree(folder(find(RADIO)), tmp_path / "radio")
    settings = json.loads((twice / "preprocessor_config.json").read_text())
    (twice / "preprocessor_config.json").write_text(
        json.dumps(
            settings | {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        )
    )
    with pytest.raises(ModelError, match=r"normalises images itself.*set do_normalize to false"):
        load_visual_encoder(VisualEncoderConfig(model=str(twice)), device="cpu")
    with pytest.raises(ModelError, match=r"'dinov3_vit'.*expected a model of type clip"):
        load_text_encoder(
            TextEncoderConfig(model=folder(find(DINOV3)), library="transformers"), device="cpu"
        )


def test_code_of_a_repository_is_never_run(folder, tmp_path):
    (tmp_path / "own.py").write_text("open('ran', 'w')\nclass Config: pass\nclass Model: pass\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mystery", "auto_map": {"AutoConfig": "own.Config"}})
    )
    for library, reason in (("transformers", "never run"), ("timm", "safetensors in")):
        with pytest.raises(ModelError, match=reason):
            load_visual_encoder(VisualEncoderConfig(model=str(tmp_path), library=library))
    with pytest.raises(ModelError, match="never run"):
        load_text_encoder(TextEncoderConfig(model=str(tmp_path), library="transformers"))
    clip = shutil.copytree(folder(find(SIGLIP)), tmp_path / "clip")
    settings = json.loads((clip / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (clip / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="code of its own, which is never run"):
        load_text_encoder(TextEncoderConfig(model=str(clip)))
    assert not list(tmp_path.rglob("ran")) and not Path("ran").exists()


def test_the_layout_of_nvidias_own_files_loads(folder):
    """Names of weights as NVIDIA's repositories have them, query, key and value in one."""
    from safetensors import safe_open

    known = find(RADIO)
    with safe_open(Path(folder(known)) / "model.safetensors", framework="np") as file:
        names = list(file.keys())
    assert any(name.startswith("radio_model.model.blocks.0.attn.qkv") for name in names)
