"""Run: pytest tests/ovref/test_check_models.py"""

import json
import pickle
import shutil

import pytest
import torch
from transformers import ViTConfig, ViTModel

from ovref.check_models import (
    BLOCK_BYTES,
    WHOLE_BYTES,
    CheckedModel,
    changed_models,
    check_models,
    models_of,
    weights_fingerprint,
)
from ovref.errors import ModelError
from ovref.models.noun_grounding import DetectorRoute, ProposalRoute
from ovref.stages.embed import Embed
from ovref.stages.extract_nouns import ExtractNouns
from ovref.stages.ground import Ground
from ovref.stages.synthesize import Synthesize
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.models import resolve
from ovref_inference.proposers.config import (
    GroundingDinoConfig,
    MaskFormerConfig,
    OpenCutProposerConfig,
    ProposerConfig,
    SamConfig,
)

CLIP = TextEncoderConfig(model="miniature:clip")
DINO = VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64))
CROPS = VisualEncoderConfig(
    model="miniature:clip", library="open_clip", features="crop_heatmap", size_hw=(64, 64)
)
KEYS = VisualEncoderConfig(model="miniature:dino", features="keys", size_hw=(64, 64))


def proposals(**proposer):
    visual = CROPS if "mask_former" in proposer else VisualEncoderConfig(
        model="miniature:clip", library="open_clip", features="crop_binary", size_hw=(64, 64)
    )  # fmt: skip
    return Ground(
        proposals=ProposalRoute(proposer=ProposerConfig(**proposer), visual=visual, text=CLIP)
    )


SPECS = {
    "nouns": ExtractNouns(),
    "synthesize": Synthesize(
        model="miniature:stable_diffusion", size_hw=(64, 64), factors=(1,), batch_size=16,
        guided_share=0.5, channels_last=True, fused_projections=True, compiled=True,
    ),
    "embed": Embed(visual=DINO, text=CLIP),
    "background": Embed(visual=DINO, text=CLIP, part="background"),
    "crops": Embed(visual=CROPS, text=CLIP),
    "detector": Ground(
        detector=DetectorRoute(
            detector=GroundingDinoConfig(model="miniature:grounding_dino"),
            sam=SamConfig(model="miniature:sam"),
        )
    ),
    "mask_former": proposals(mask_former=MaskFormerConfig(model="miniature:maskformer")),
    "opencut": proposals(opencut=OpenCutProposerConfig(keys=KEYS)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_the_miniatures_models_pass(name, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", None)  # nothing is compiled for it
    found = check_models([SPECS[name]])
    assert {model.step for model in found} == {SPECS[name].name}
    assert all(model.weights.startswith("sha256:") for model in found)
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_model_is_named_with_its_setting():
    found = dict((path, model) for path, model, _ in models_of(SPECS["detector"]))
    assert found == {
        "detector.detector.model": "miniature:grounding_dino",
        "detector.sam.model": "miniature:sam",
    }
    (tagger,) = models_of(ExtractNouns(tagger="en_core_web_sm", tagger_version="3.8.0"))
    assert tagger == ("tagger", "en_core_web_sm", "3.8.0")


def test_a_backbone_that_fails_in_forward_is_found(tmp_path):
    """A ViT whose features are not the grid that it is taken for: it loads well."""
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, image_size=32, patch_size=8)  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_register_tokens": 3}))
    spec = Embed(visual=VisualEncoderConfig(model=str(tmp_path), size_hw=(32, 32)), text=CLIP)
    with pytest.raises(ModelError, match="is not supported: for an image of 32 x 32"):
        check_models([spec])


class Broken(Embed):
    """A stage whose models load."""

    def build(self):
        def stage(records):
            list(records)
            raise IndexError("index out of range in self")

        return stage


def test_whatever_a_model_raises_becomes_one_sentence():
    with pytest.raises(ModelError, match=r"(?s)embed fails on a blank .*miniature:dinov2, minia.*"
                       r"IndexError: index out of range"):  # fmt: skip
        check_models([Broken(visual=DINO, text=CLIP)])


def test_numbers_that_are_not_finite_are_found(tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(resolve("miniature:stable_diffusion"), folder)
    from safetensors.torch import load_file, save_file

    path = next((folder / "vae").glob("*.safetensors"))
    state = load_file(path)
    state["decoder.conv_out.bias"][0] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    spec = Synthesize(model=str(folder), size_hw=(64, 64), factors=(1,))
    with pytest.raises(ModelError, match="non-finite numbers"):
        check_models([spec])


def test_steps_that_the_scheduler_cannot_make_are_refused():
    spec = Synthesize(model="miniature:stable_diffusion", size_hw=(64, 64), factors=(1,),
                      scheduler="lcm", steps=60)  # fmt: skip
    with pytest.raises(ModelError, match="cannot make 60 steps"):
        check_models([spec])


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_files_are_fingerprinted_by_name_size_and_content(tmp_path):
    write(tmp_path / "a" / "model.safetensors", b"1234")
    write(tmp_path / "a" / "config.json", b"{}")
    first = weights_fingerprint(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "b" / ".cache" / "lock", b"x")
    assert weights_fingerprint(str(tmp_path / "b")) == first
    for name, data in {"model.safetensors": b"1235", "config.json": b"{ }", "more": b""}.items():
        shutil.copytree(tmp_path / "a", tmp_path / name / "c")
        write(tmp_path / name / "c" / name, data)
        assert weights_fingerprint(str(tmp_path / name / "c")) != first


def test_of_a_large_file_blocks_are_hashed(tmp_path):
    path, size = tmp_path / "sam.pth", WHOLE_BYTES + 1
    path.write_bytes(bytes(size))
    first = weights_fingerprint(str(path))
    for place in (0, BLOCK_BYTES - 1, size - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"\1")
            file.flush()
            assert weights_fingerprint(str(path)) != first
            file.seek(place)
            file.write(b"\0")
    assert weights_fingerprint(str(path)) == first


def test_of_a_hub_id_the_commit_in_the_cache_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--facebook--dinov2-large"
    write(folder / "refs" / "main", commit.encode())
    (folder / "snapshots" / commit).mkdir(parents=True)
    assert weights_fingerprint("facebook/dinov2-large") == f"commit:{commit}"
    assert weights_fingerprint("hf-hub:facebook/dinov2-large", commit) == f"commit:{commit}"
    assert weights_fingerprint("facebook/dinov2-large", "other") == "unknown"
    clip = tmp_path / "models--timm--vit_large_patch14_clip_224.openai"
    write(clip / "refs" / "main", commit.encode())
    assert weights_fingerprint("ViT-L-14:openai") == f"commit:{commit}"


def test_an_installed_package_is_fingerprinted():
    assert weights_fingerprint("ovref_miniature").startswith("sha256:")
    assert weights_fingerprint("no_such_package") == "unknown"


def test_other_weights_under_the_same_name_are_named():
    old = CheckedModel(step="embed", setting="visual.model", model="dino", revision="",
                       weights="sha256:1")  # fmt: skip
    new = CheckedModel(step="embed", setting="visual.model", model="dino", revision="",
                       weights="sha256:2")  # fmt: skip
    (line,) = changed_models([old], [new])
    assert line.startswith("embed.visual.model=dino has different weights than before: sha256:1")
    assert changed_models([old], [old]) == []
