"""Trains UNet and text encoder of the miniature Stable Diffusion on the latents of its VAE.

    python -m recipes.miniature.train_diffusion --work DIR

Needs `train_vae` and `train_backbone` first. Velocity prediction; one thing per image for the first
steps, then the full variety; a tenth of the captions is dropped for classifier-free guidance.
Representation alignment (REPA, arXiv 2410.06940) ties names to shapes: the UNet's features of a
noisy image with its caption must predict the DINOv2 features of the clean image. `--export FOLDER`
only writes the averaged weights of the latest checkpoint as a pipeline folder, also while training
resumes.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from recipes.miniature.architectures import (
    VIT_WIDTH,
    new_scheduler,
    new_text_encoder,
    new_unet,
    new_vae,
    save_stable_diffusion,
)
from recipes.miniature.data import load_pool
from recipes.miniature.tokenizer import CONTEXT, save_tokenizer
from recipes.miniature.train_backbone import describe_pool
from recipes.miniature.training import fit, images_to_torch, load_average, note, parse_arguments

CAPTION_DROP = 0.1
PHASES = (
    (1500, 24, 0.0, 0.0),
    (2400, 24, 1.0, 0.0),
    (6500, 16, 0.5, 0.7),
    (None, 32, 0.4, 0.5),
)
"""Until step, images per step, share from the full variety, share of middle timesteps.

One thing per image first: attention to things does not begin in crowded scenes. Middle timesteps
last: they decide what shape a blob becomes, and the shape is what a name must be tied to.
"""
MIDDLE = (300, 950)
ALIGNMENT = 0.5
"""Weight of the alignment term, one minus cosine, beside the squared error of the velocity."""


def trained_vae(work):
    """The averaged VAE of the work folder; its configuration scales latents to unit variance."""
    vae = new_vae()
    load_average("vae", work, vae)
    facts = Path(work) / "latents.json"
    if facts.is_file():
        vae.register_to_config(scaling_factor=json.loads(facts.read_text())["scaling_factor"])
    return vae


@torch.no_grad()
def encode_pool(work, name):
    """Latents of a pool, float16 (n, 4, 16, 16), unscaled; computed once and kept."""
    path = Path(work) / f"latents_{name}.npy"
    if not path.is_file():
        vae, pool = trained_vae(work), load_pool(work, name)
        vae = vae.to(memory_format=torch.channels_last)
        latents = [
            vae.encode(images_to_torch(pool.images_nhwc[i : i + 64]))
            .latent_dist.mean.half()
            .numpy()
            for i in range(0, len(pool.captions), 64)
        ]
        np.save(path, np.concatenate(latents))
    return np.load(path)


def tokenize(work, captions):
    """Token ids, int64 (n, CONTEXT), padded with the end token."""
    tokenizer = save_tokenizer(Path(work) / "tokenizer", pad="<|endoftext|>")
    return tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=CONTEXT,
        return_tensors="pt",
    ).input_ids


class Denoiser(nn.Module):
    """UNet and text encoder, trained together, and the head that predicts DINOv2's features."""

    def __init__(self):
        super().__init__()
        self.unet = new_unet()
        self.text_encoder = new_text_encoder()
        # The deepest features at full resolution, from which the last blocks make the image.
        self.unet.up_blocks[0].register_forward_hook(
            lambda module, inputs, output: self.caught.update(features=output)
        )
        deepest = self.unet.config.block_out_channels[-1]
        self.describe = nn.Sequential(
            nn.Conv2d(deepest, 192, 1), nn.SiLU(), nn.Conv2d(192, VIT_WIDTH, 1)
        )
        self.caught = {}

    def forward(self, noisy_nchw, timesteps_n, ids_nl):
        """Predicted velocity of latents (n, 4, 16, 16) at timesteps in [0, 1000) under captions,
        and guessed DINOv2 features of the clean image (n, 96, 16, 16)."""
        states = self.text_encoder(ids_nl).last_hidden_state
        velocity = self.unet(noisy_nchw, timesteps_n, encoder_hidden_states=states).sample
        return velocity, self.describe(self.caught.pop("features"))


def main():
    if "--export" in sys.argv:
        at = sys.argv.index("--export")
        folder = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    else:
        folder = None
    arguments = parse_arguments(__doc__, steps=13_500)
    work = arguments.work
    if folder is not None:
        export(work, folder)
        return
    names = ("single", "mixed")
    latents = [torch.from_numpy(encode_pool(work, name)).float() for name in names]
    scale = 1 / float(latents[1].std())
    (work / "latents.json").write_text(json.dumps({"scaling_factor": round(scale, 5)}))
    latents = [round(scale, 5) * z for z in latents]
    described = [describe_pool(work, name) for name in names]
    ids = [tokenize(work, load_pool(work, name).captions) for name in names]
    (nothing,) = tokenize(work, [""])
    scheduler = new_scheduler()
    torch.manual_seed(2)
    model = Denoiser()

    def loss_of(step, rng):
        batch, full, middle = next(p[1:] for p in PHASES if p[0] is None or step < p[0])
        rows = [rng.integers(len(z), size=batch) for z in latents]
        pick = rng.random(batch) < full
        clean = torch.where(
            torch.from_numpy(pick)[:, None, None, None], latents[1][rows[1]], latents[0][rows[0]]
        )
        tokens = torch.where(torch.from_numpy(pick)[:, None], ids[1][rows[1]], ids[0][rows[0]])
        tokens[torch.from_numpy(rng.random(batch) < CAPTION_DROP)] = nothing
        noise = torch.randn_like(clean)
        # Evenly spread timesteps: less variance than independent ones.
        spread = (rng.permutation(batch) + rng.random(batch)) / batch
        low, high = MIDDLE
        t = np.where(rng.random(batch) < middle, low + spread * (high - low), spread * 1000)
        t = torch.from_numpy(t).long()
        noisy = scheduler.add_noise(clean, noise, t)
        velocity, guess = model(noisy, t, tokens)
        error = ((velocity - scheduler.get_velocity(clean, noise, t)) ** 2).mean()
        true = np.stack([described[int(p)][rows[int(p)][i]] for i, p in enumerate(pick)])
        cosine = functional.cosine_similarity(guess, torch.from_numpy(true).float()).mean()
        loss = error + ALIGNMENT * (1 - cosine)
        return loss, {"error": error.item(), "cosine": cosine.item()}

    facts = fit("diffusion", work, model, loss_of, arguments.steps, rate=8e-4, average=0.998)
    note(work, diffusion=facts)


def export(work, folder):
    """Writes the averaged weights of the latest checkpoints as a pipeline folder."""
    model = Denoiser()
    step = load_average("diffusion", work, model)
    save_stable_diffusion(folder, trained_vae(work), model.unet, model.text_encoder)
    return step


if __name__ == "__main__":
    main()
