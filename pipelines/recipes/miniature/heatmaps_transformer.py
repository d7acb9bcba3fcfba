"""Attribution of real scenes by block and timestep, to measure the miniature Stable Diffusion 3.

As `heatmaps` does for the UNet: a rendered scene is encoded, mixed with noise at a few timesteps
and passed to the transformer with its true caption. Both readings of
`ovref.models.joint_attribution` are taken from explicit softmax attention, of every block on its
own.
"""

import numpy as np
import torch
from torch.nn import functional

from ovref.miniature.shapes import CLASSES
from recipes.miniature.architectures_transformer import GRID, ZEROS
from recipes.miniature.heatmaps import token_columns
from recipes.miniature.train_diffusion_transformer import RepeatedLastToken
from recipes.miniature.training import images_to_torch

READINGS = ("share", "output")
TIMESTEPS = (100, 300, 500, 700, 900)
CONTEXT = 77
"""Tokens of CLIP, of which the nouns' are some."""


class _Keeping(RepeatedLastToken):
    """Attends with explicit softmax, and keeps what image positions have to do with each token."""

    def __init__(self, store):
        super().__init__(ZEROS)
        self.store = store

    def attend(self, query_bhqd, key_bhkd, value_bhkd):
        scores = query_bhqd @ key_bhkd.mT / query_bhqd.shape[-1] ** 0.5
        probabilities = scores.softmax(-1)
        out = probabilities @ value_bhkd
        image, text = slice(0, GRID * GRID), slice(GRID * GRID, GRID * GRID + CONTEXT)
        share_bpt = probabilities[:, :, image, text].mean(1)
        product_bpt = torch.einsum("bhpd,bhtd->bpt", out[:, :, image], out[:, :, text])
        self.store.append(torch.stack([share_bpt, product_bpt]))
        return out


def record_attention(transformer):
    """Replaces the blocks' attention; returns the list that a pass fills, block by block, with
    (readings, n, positions, tokens)."""
    store = []
    for block in transformer.transformer_blocks:
        block.attn.set_processor(_Keeping(store))
    return store


@torch.no_grad()
def attention_of_scenes(pipeline, scenes, timesteps=TIMESTEPS, seed=0, batch=16):
    """Attribution of all noun mentions of `scenes`, by reading, timestep and block.

    Args:
        pipeline: a loaded StableDiffusion3Pipeline, fp32; its transformer's attention stays
            replaced by a slow one.
        scenes: list of Scene.
        timesteps: noise levels in (0, 1000].
        seed: of the noise.
        batch: scenes per pass.

    Returns:
        maps (readings, timesteps, blocks, mentions, 16, 16) float32: the mean over the noun's
        tokens. classes (mentions,) and scene index (mentions,).
    """
    store = record_attention(pipeline.transformer)
    generator = torch.Generator().manual_seed(seed)
    every = [[] for _ in timesteps]
    classes, rows = [], []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        images = images_to_torch(np.stack([s.image_hwc for s in part]))
        clean = pipeline.vae.encode(images).latent_dist.mean
        clean = (clean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        text, _, pooled, _ = pipeline.encode_prompt(
            [s.caption for s in part], None, None, do_classifier_free_guidance=False
        )
        # The attention repeats the last token: one vector of zeros is enough.
        text = text[:, : CONTEXT + 1]
        columns = [token_columns(pipeline.tokenizer, s.caption, s.nouns) for s in part]
        classes += [CLASSES.index(n.lemma) for s in part for n in s.nouns]
        rows += [start + i for i, s in enumerate(part) for _ in s.nouns]
        for which, t in enumerate(timesteps):
            noise = torch.randn(clean.shape, generator=generator)
            store.clear()
            pipeline.transformer(
                hidden_states=(1 - t / 1000) * clean + t / 1000 * noise,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=torch.full((len(part),), float(t)),
            )
            blocks = torch.stack(store, 1)  # readings, blocks, n, positions, tokens
            every[which].append(torch.stack([
                blocks[:, :, i, :, c].mean(3) for i, cs in enumerate(columns) for c in cs
            ], 2))  # fmt: skip
    maps = torch.stack([torch.cat(parts, 2) for parts in every], 1).unflatten(-1, (GRID, GRID))
    return maps.numpy(), np.array(classes), np.array(rows)


def enlarged(maps_nhw, size=64):
    """Maps of the grid at the size of the image, bilinearly: float32 (n, size, size)."""
    maps = torch.from_numpy(np.ascontiguousarray(maps_nhw))[:, None]
    return functional.interpolate(maps, size=size, mode="bilinear")[:, 0].numpy()
