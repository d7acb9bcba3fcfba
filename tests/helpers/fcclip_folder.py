"""A small FC-CLIP with random weights, in the layout that `proposers.fcclip` loads."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from fcclip_released import HEADS, SIZES
from ovref_inference.encoders import cnn_towers
from ovref_inference.models import resolve
from ovref_inference.proposers import fcclip
from ovref_inference.proposers.mask_decoder import MaskDecoder, MaskDecoderConfig

TOWERS = {
    "convnext": {"timm_model_name": "convnext_atto", "timm_model_pretrained": False,
                 "timm_pool": "", "timm_proj": "mlp", "image_size": 64},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
}  # fmt: skip
DIM = 24


def write_clip(folder: Path, tower: str) -> str:
    """A CLIP with a small convolutional tower, in open_clip's layout."""
    shutil.copytree(resolve("miniature:clip"), folder, dirs_exist_ok=True)
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"] |= {"embed_dim": DIM, "vision_cfg": TOWERS[tower]}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.manual_seed(0)
    clip = open_clip.CLIP(**settings["model_cfg"])
    for name, values in clip.named_parameters():
        if name.endswith(("bn3.weight", "gamma")):  # else its blocks do next to nothing
            torch.nn.init.constant_(values, 0.3)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def decoder_config(visual) -> MaskDecoderConfig:
    """Small, for this tower."""
    sizes = SIZES | {"widths": tuple(cnn_towers.widths(visual)), "dim": DIM}
    return MaskDecoderConfig(heads=HEADS, **sizes)


def write_fcclip(folder: Path, tower: str = "convnext", names=("tree", "boat")) -> str:
    """The whole folder, with the CLIP in it."""
    folder.mkdir(parents=True)
    visual = open_clip.create_model(f"local-dir:{write_clip(folder / 'clip', tower)}").visual
    config = decoder_config(visual)
    torch.manual_seed(1)
    save_file(MaskDecoder(config).state_dict(), folder / fcclip.WEIGHTS)
    settings = {
        "format": fcclip.FORMAT, "clip": "clip", "decoder": asdict(config),
        "trained_names": names, "templates": ["a {}."],
    }  # fmt: skip
    (folder / fcclip.SETTINGS).write_text(json.dumps(settings))
    return str(folder)
