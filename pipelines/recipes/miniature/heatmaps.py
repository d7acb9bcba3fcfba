"""Attribution heatmaps of real scenes, to measure the attention of the miniature Stable Diffusion.

A rendered scene is encoded, noised to a few timesteps and passed to the UNet with its true caption;
the cross-attention probabilities of every noun's tokens are averaged over heads and layers. This
measures the weights only; the pipeline's own heatmaps are made while an image is generated
(`ovref.models`).
"""

import numpy as np
import torch
from torch.nn import functional

from ovref.miniature.shapes import CLASSES, STUFF
from recipes.miniature.training import images_to_torch

TIMESTEPS = (50, 100, 200, 300, 500, 700)
LOW_NOISE = (50, 100, 200, 300)
"""The timesteps whose attention is sharpest in the miniature."""


class _Recorder:
    """Attention processor that attends as usual and keeps the probabilities of all tokens."""

    def __init__(self, store):
        self.store = store

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **unused):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        scores = torch.einsum("bqd,bkd->bqk", query.float(), key.float()) * attn.scale
        probabilities = scores.softmax(-1)
        self.store.append(probabilities.unflatten(0, (len(hidden_states), -1)).mean(1))
        out = attn.batch_to_head_dim(probabilities.to(value.dtype) @ value)
        return attn.to_out[1](attn.to_out[0](out))


def record_attention(unet):
    """Replaces cross-attention processors; returns the list that fills with (n, pixels, tokens)."""
    store = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(_Recorder(store))
    return store


def token_columns(tokenizer, caption, nouns):
    """Token positions of every noun: list of int arrays, by character overlap."""
    offsets = tokenizer(caption, return_offsets_mapping=True).offset_mapping
    return [
        np.array(
            [i for i, (a, b) in enumerate(offsets) if a < noun.end and b > noun.start and b > a]
        )
        for noun in nouns
    ]


@torch.no_grad()
def attention_of_scenes(pipeline, scenes, timesteps=TIMESTEPS, seed=0, batch=32):
    """Mean attention of all noun mentions of `scenes`.

    Args:
        pipeline: a loaded StableDiffusionPipeline, fp32.
        scenes: list of Scene.
        timesteps: noise levels in [0, 1000).
        seed: of the noise.
        batch: scenes per pass.

    Returns:
        maps (len(timesteps), 2, mentions, 64, 64) float32: probability mass on the noun's tokens,
        bilinearly enlarged; axis 1 is resolution (16x16 layers, 8x8 layers). classes (mentions,)
        and scene index (mentions,).
    """
    store = record_attention(pipeline.unet)
    generator = torch.Generator().manual_seed(seed)
    every = [[] for _ in timesteps]
    classes, rows = [], []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        images = images_to_torch(np.stack([s.image_hwc for s in part]))
        clean = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        ids = pipeline.tokenizer(
            [s.caption for s in part],
            padding="max_length",
            truncation=True,
            max_length=pipeline.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        states = pipeline.text_encoder(ids).last_hidden_state
        columns = [token_columns(pipeline.tokenizer, s.caption, s.nouns) for s in part]
        classes += [CLASSES.index(n.lemma) for s in part for n in s.nouns]
        rows += [start + i for i, s in enumerate(part) for _ in s.nouns]
        for which, t in enumerate(timesteps):
            noise = torch.randn(clean.shape, generator=generator)
            t = torch.full((len(part),), t)
            store.clear()
            pipeline.unet(
                pipeline.scheduler.add_noise(clean, noise, t), t, encoder_hidden_states=states
            )
            sizes = []
            for side in (16, 8):
                total = torch.stack([p for p in store if p.shape[1] == side * side]).mean(0)
                nouns = torch.stack(
                    [total[i][:, c].sum(1) for i, cs in enumerate(columns) for c in cs]
                )
                sizes.append(functional.interpolate(nouns.unflatten(1, (1, side, side)), size=64,
                                                    mode="bilinear")[:, 0])  # fmt: skip
            every[which].append(torch.stack(sizes))
    maps = torch.stack([torch.cat(parts, 1) for parts in every])
    return maps.numpy(), np.array(classes), np.array(rows)


def iou_by_kind(masks_nhw, classes_n, rows_n, scenes):
    """Mean intersection over union of predicted masks with the true ones: (things, stuff)."""
    truth = np.stack([scenes[r].label_hw == c for r, c in zip(rows_n, classes_n, strict=True)])
    iou = (masks_nhw & truth).sum((1, 2)) / np.maximum((masks_nhw | truth).sum((1, 2)), 1)
    is_stuff = classes_n < len(STUFF)
    return float(iou[~is_stuff].mean()), float(iou[is_stuff].mean())


def minmax(maps_nhw):
    """Every map stretched to [0, 1]."""
    low, high = maps_nhw.min((1, 2), keepdims=True), maps_nhw.max((1, 2), keepdims=True)
    return (maps_nhw - low) / np.maximum(high - low, 1e-12)


def otsu(maps_nhw, bins=64):
    """Masks split at the threshold of every map that separates its two halves best (Otsu)."""
    scaled = (minmax(maps_nhw) * (bins - 1)).astype(int).reshape(len(maps_nhw), -1)
    counts = np.stack([np.bincount(row, minlength=bins) for row in scaled]).astype(float)
    below = counts.cumsum(1)
    total, moment = below[:, -1:], (counts * np.arange(bins)).cumsum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[:, -1:] * below / total - moment) ** 2 / (below * (total - below))
    cut = np.nan_to_num(between, nan=-1.0).argmax(1)
    return (scaled > cut[:, None]).reshape(maps_nhw.shape)
