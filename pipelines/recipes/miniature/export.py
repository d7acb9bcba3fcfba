"""Writes the averaged weights of the latest checkpoints as model folders.

    python -m recipes.miniature.export --work DIR [--output pipelines/ovref_miniature/weights]

May run while models are training; a model without a checkpoint is left unchanged. `training.json`
records the steps and seconds behind every folder. `DIR/clip_rc`, `DIR/fcclip` and
`DIR/open_mask_former` are the outputs of `ovref train --config miniature_clip_rc`,
`miniature_fcclip` and `miniature_mask_former`.
"""

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from ovref_inference.segmenters.clip_rc import HEAD, WEIGHTS, read_head
from ovref_miniature import FOLDER
from recipes.miniature.architectures import (
    CONVNEXT_CONFIG,
    Classifier,
    new_clip_convnext,
    new_dino,
    new_dinov2,
    save_clip,
    save_stable_diffusion,
    save_state,
    save_vit,
)
from recipes.miniature.architectures_grounding import (
    new_grounding_dino,
    new_maskformer,
    new_sam,
    save_grounding_dino,
    save_maskformer,
    save_sam,
)
from recipes.miniature.train_backbone import Probed
from recipes.miniature.train_clip import Imitating
from recipes.miniature.train_diffusion import Denoiser, trained_vae
from recipes.miniature.train_grounding_dino import WithProbes
from recipes.miniature.train_maskformer import Layered
from recipes.miniature.training import load_average


def export(work, output):
    """Exports every model with a checkpoint in `work`; returns {training: steps and seconds}."""
    done = {}

    def load(name, model):
        if not (work / f"{name}.pt").is_file():
            return False
        load_average(name, work, model)
        state = torch.load(work / f"{name}.pt", weights_only=True)
        done[name] = {"steps": state["step"], "seconds": round(state["seconds"], 1)}
        return True

    denoiser, clip, classifier = Denoiser(), Imitating(), Classifier()
    dinov2, dino = Probed(new_dinov2()), Probed(new_dino())
    if load("diffusion", denoiser):
        vae = trained_vae(work)
        load("vae", vae)
        save_stable_diffusion(
            output / "stable_diffusion", vae, denoiser.unet, denoiser.text_encoder
        )
    if load("clip", clip):
        save_clip(output / "clip", clip.clip)
    convnext = new_clip_convnext()
    if load("clip_convnext", convnext):
        save_clip(output / "clip_convnext", convnext, CONVNEXT_CONFIG)
    for name, model in (("dinov2", dinov2), ("dino", dino)):
        # The one that was trained further is the better one.
        if load(f"{name}_refined", model) or load(name, model):
            save_vit(output / name, model.backbone)
    if load("classifier", classifier):
        (output / "classifier").mkdir(parents=True, exist_ok=True)
        save_state(output / "classifier" / "model.safetensors", classifier)
    sam, probed, layered = new_sam(), WithProbes(new_grounding_dino()), Layered(new_maskformer())
    if load("sam", sam):
        save_sam(output / "sam", sam)
    if load("grounding_dino", probed):
        save_grounding_dino(output / "grounding_dino", probed.detector)
    if load("maskformer", layered):
        save_maskformer(output / "maskformer", layered.maskformer)
    for name, described in (("fcclip", "fcclip.json"), ("open_mask_former", "config.json")):
        if (work / name / described).is_file():
            done[name] = save_proposer(work / name, described, output / name)
    if (work / "clip_rc" / HEAD).is_file():
        done["clip_rc"] = save_clip_rc(work / "clip_rc", output / "clip_rc")
    path = output / "training.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | done, indent=1, sort_keys=True) + "\n")
    return done


def halves(tensors):
    """The tensors with floating-point numbers in half precision."""
    return {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def save_proposer(trained, described, folder):
    """Copies what `ovref train` has made of a proposer, in half precision; returns its steps and
    seconds.

    Args:
        trained: the output of the training.
        described: name of its JSON file that has the facts about the training.
        folder: the model's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in trained.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    for path in trained.glob("*.safetensors"):
        (folder / path.name).write_bytes(save(halves(load_file(path)), metadata={"format": "pt"}))
    tree = json.loads((trained / described).read_text())
    facts = tree["training"] if "training" in tree else tree["open_classes"]["training"]
    return {name: facts[name] for name in ("steps", "seconds")}


def save_clip_rc(trained, folder):
    """Copies a trained head in half precision; returns its steps and seconds."""
    head, tensors = read_head(str(trained))
    weights = save(halves(tensors))
    settings = {**head.training["settings"], "output": "runs/miniature_clip_rc"}
    head = replace(
        head,
        training={**head.training, "settings": settings},
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / HEAD).write_bytes(head.encoded() + b"\n")
    return {name: head.training[name] for name in ("steps", "seconds")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=FOLDER / "weights")
    arguments = parser.parse_args()
    print(json.dumps(export(arguments.work, arguments.output)))


if __name__ == "__main__":
    main()
