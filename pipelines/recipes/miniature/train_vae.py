"""Trains the VAE of the miniature Stable Diffusion.

    python -m recipes.miniature.train_vae --work DIR

Squared error (it punishes a wrong colour of a small thing more than absolute error does), some
absolute error, error of image gradients (keeps outlines) and a small KL term. No adversary.
"""

import torch
from torch.nn import functional

from recipes.miniature.architectures import new_vae
from recipes.miniature.data import load_pool
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 8
KL_WEIGHT = 1e-6


def _edges(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def main():
    arguments = parse_arguments(__doc__, steps=2600)
    pool = load_pool(arguments.work, "single", "mixed")
    torch.manual_seed(1)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss_of(step, rng):
        x = images_to_torch(pool.images_nhwc[rng.integers(len(pool.captions), size=BATCH)])
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        pixel = 0.5 * functional.l1_loss(y, x) + 3 * functional.mse_loss(y, x)
        edge = sum(functional.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        psnr = -10 * torch.log10(functional.mse_loss(y.detach(), x) / 4)
        return pixel + 0.3 * edge + KL_WEIGHT * 256 * kl, {"psnr": psnr.item(), "kl": kl.item()}

    facts = fit("vae", arguments.work, vae, loss_of, arguments.steps, rate=2e-3, average=0.99)
    note(arguments.work, vae=facts)


if __name__ == "__main__":
    main()
