"""What `ovref check` says of a model, and that a wrong one is noticed."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from ovref.known_models import describe, own_forward
from ovref.known_models.random_weights import write
from ovref.known_models.shapes import shape_of
from ovref.known_models.table import ENCODERS, find
from ovref.licences import UNKNOWN, licence_of
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.proposers.config import GroundingDinoConfig, SamConfig

CLIP, SIGLIP, DINO = (
    "openai/clip-vit-large-patch14",
    "google/siglip2-large-patch16-256",
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
)

LARGE = (
    DINO, SIGLIP, "google/tipsv2-l14", "nvidia/C-RADIOv3-L", "facebook/vit-mae-large",
    "facebook/dinov2-large", "facebook/dinov2-with-registers-large", CLIP, "ViT-L-14:openai",
    "ViT-L-16-SigLIP2-256:webli", "PE-Core-L-14-336:meta", "EVA02-L-14:merged2b_s4b_b131k",
)  # fmt: skip
"""ViTs of about 300 million numbers."""
LENGTHS = {
    "google/tipsv2-l14": 64, SIGLIP: 64, "google/siglip2-base-patch16-naflex": 64,
    "ViT-L-16-SigLIP2-256:webli": 64, "PE-Core-L-14-336:meta": 32,
}  # fmt: skip
"""Tokens of a text, where they are not 77."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Settings of a stage with two encoders, one of them deeper inside."""

    visual: VisualEncoderConfig
    text: TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    pair: Pair
    threshold: float = 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        model: str(write(find(model), root / str(number), tiny=True))
        for number, model in enumerate((SIGLIP, DINO))
    }


@pytest.fixture
def stage(folders):
    visual = VisualEncoderConfig(model=folders[DINO], size_hw=(64, 100))
    text = TextEncoderConfig(model=folders[SIGLIP], library="transformers")
    return Stage(pair=Pair(visual=visual, text=text))


def test_encoders_are_described_and_agree_with_their_libraries(stage, folders):
    found = describe.describe("embed", stage, {folders[DINO]: DINO})
    assert [one.setting for one in found] == ["embed.pair.visual", "embed.pair.text"]
    assert not any(one.problem for one in found)
    text = describe.text(found)
    for part in (
        f"embed.pair.visual: {DINO}",
        "licence   DINOv3 License",
        "DINOv3ViTModel of transformers",
        "64 x 96 pixels (bilinear), values divided by 255, mean 0.485, 0.456, 0.406",
        "4 x 6 cells of 16 pixels, 32 numbers each; 5 class and register tokens are left out",
        "the same as transformers's own forward pass",
        "SiglipModel of transformers",
        "of 64 tokens, what is longer is cut; 32 numbers",
    ):
        assert part in text
    assert describe.others_of(stage) == []


def test_features_that_differ_are_a_problem(stage, monkeypatch):
    real = own_forward.dense
    monkeypatch.setattr(own_forward, "dense", lambda *given: np.flip(real(*given), 1))
    first, second = describe.describe("embed", stage)
    assert "DIFFERENT from transformers's own forward pass" in first.problem
    assert not second.problem


def test_a_model_that_cannot_be_used_is_told_and_the_next_is_described(stage, folders):
    wrong = replace(stage.pair, visual=replace(stage.pair.visual, features="values"))
    first, second = describe.describe("embed", replace(stage, pair=wrong))
    assert "DINOv3ViTModel" in first.problem and "CLIP" in first.problem and not first.lines
    assert "CANNOT BE USED" in describe.text([first, second])
    assert not second.problem


def test_other_features_are_compared_by_the_tokens(stage):
    keys = replace(stage.pair, visual=replace(stage.pair.visual, features="keys", layer=-2))
    found = describe.describe("embed", replace(stage, pair=keys))[0]
    text = "\n".join(found.lines)
    assert "layer -2 counts as the last" in text
    assert "compared  tokens of the last layer, the same as" in text
    half = replace(stage.pair, visual=replace(stage.pair.visual, precision="bfloat16"))
    found = describe.describe("embed", replace(stage, pair=half))[0]
    assert "near transformers's own forward pass in float32" in found.lines[-1]


def test_detectors_and_sams_run():
    detector, _ = describe._detector(GroundingDinoConfig(model="miniature:grounding_dino"))
    sam, _ = describe._sam(SamConfig(model="miniature:sam"))
    assert "boxes of nouns, above 0.35" in detector[0]
    assert "SamModel of transformers" in sam[0]


# timm's configurations lie with the weights; tiny ones are tested below.
WITH_SHAPES = [known for known in ENCODERS if known.library != "timm"]


@pytest.mark.parametrize("known", WITH_SHAPES, ids=[known.model for known in WITH_SHAPES])
def test_shapes_alone_give_the_published_sizes(known, tmp_path):
    """From configurations of the real size, without weights."""
    if known.library == "open_clip":
        model = known.model
    else:
        from ovref.known_models.random_weights import settings_of

        settings_of(known).save_pretrained(tmp_path)
        model = str(tmp_path)
    lines = shape_of(VisualEncoderConfig(model=model, library=known.library, size_hw=(448, 224)))
    assert "cells of" in lines[1] and "million numbers" in lines[2]
    if known.model in LARGE:
        assert 290 < float(lines[2].split()[1]) < 330
    if "text" in known.roles:
        text = shape_of(TextEncoderConfig(model=model, library=known.library))
        assert text[1] == f"texts     up to {LENGTHS.get(known.model, 77)} tokens"


def test_shapes_of_timm_and_of_a_wrong_model(tmp_path):
    folder = write(find("timm/vit_large_patch16_dinov3.lvd1689m"), tmp_path / "a", tiny=True)
    for library in ("timm", "transformers"):
        config = VisualEncoderConfig(model=str(folder), library=library, size_hw=(64, 96))
        kind, grid, _ = shape_of(config)
        assert "Eva" in kind and "4 x 6 cells of 16 pixels" in grid and "5 class" in grid
    visual = VisualEncoderConfig(model=str(tmp_path))
    pair = Pair(visual=visual, text=TextEncoderConfig(model="miniature:clip"))
    found = describe.describe("embed", Stage(pair=pair), shapes=True)
    assert "cannot load the visual encoder" in found[0].problem
    assert "up to 77 tokens" in found[1].lines[2]


def test_licences_are_known_where_publishers_state_them():
    unknown = [known.model for known in ENCODERS if licence_of(known.model) == UNKNOWN]
    assert unknown == ["facebook/metaclip-2-worldwide-b16"]
