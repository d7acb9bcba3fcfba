"""Makes a work folder from the shipped weights, so that training can continue.

    python -m recipes.miniature.restart --work DIR [--weights pipelines/ovref_miniature/weights]

The optimiser starts from scratch, as do unshipped parts (heads used only in training); existing
checkpoints are left unchanged.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from ovref_miniature import FOLDER
from recipes.miniature.architectures import Classifier, new_vae
from recipes.miniature.train_clip import Imitating
from recipes.miniature.train_diffusion import Denoiser
from recipes.miniature.training import save_checkpoint


def restart(work, weights):
    """Writes a checkpoint for every shipped model that can be continued; returns their names."""
    work.mkdir(parents=True, exist_ok=True)
    done = json.loads((weights / "training.json").read_text())
    folder = weights / "stable_diffusion"
    vae, denoiser, clip, classifier = new_vae(), Denoiser(), Imitating(), Classifier()
    shipped = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.load_state_dict(shipped.state_dict())
    scale = {"scaling_factor": shipped.config.scaling_factor}
    (work / "latents.json").write_text(json.dumps(scale))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    denoiser.unet.load_state_dict(unet.state_dict())
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    denoiser.text_encoder.load_state_dict(text.state_dict())
    clip.clip.load_state_dict(load_file(weights / "clip" / "open_clip_model.safetensors"))
    classifier.load_state_dict(load_file(weights / "classifier" / "model.safetensors"))
    written = []
    models = {"vae": vae, "diffusion": denoiser, "clip": clip, "classifier": classifier}
    for name, model in models.items():
        path = work / f"{name}.pt"
        if not path.is_file():
            mean = [p.detach() for p in model.parameters()]
            save_checkpoint(path, model, mean, done[name]["steps"], done[name]["seconds"])
            written.append(name)
    for name in ("dinov2", "dino"):
        shutil.copytree(weights / name, work / name, dirs_exist_ok=True)
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=FOLDER / "weights")
    arguments = parser.parse_args()
    print(" ".join(restart(arguments.work, arguments.weights)))


if __name__ == "__main__":
    main()
