"""Continues training of the DINOv2 and DINO backbones with pseudo-labels from their own features.

    python -m recipes.miniature.refine_backbone --work DIR

`train_backbone` leaves features that a linear probe reads far better than nearest neighbours do. So
the probe, fitted to captions alone, labels every patch (a class that the caption names, or any
stuff), and the backbones learn to gather each class around a prototype. No mask is seen. Needs the
folders `dinov2` and `dino` in the work folder.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Dinov2Model, ViTModel

from ovref.miniature.shapes import CLASSES, STUFF
from recipes.miniature.architectures import save_vit
from recipes.miniature.data import load_pool
from recipes.miniature.train_backbone import (
    GRID,
    Probed,
    describe_pool,
    jitter,
    mix_blocks,
    probe_loss,
    with_stuff,
)
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH, PROBE_BATCH = 16, 96
POOLS = ("single", "mixed")
OWNED = 24
"""A named class must own about this many of the 256 patches according to the probe."""


def label_patches(work, tokens_of, named_nc, steps):
    """Class of every patch, uint8 (n, 256), by a linear probe fitted to captions alone: a class
    that the image's caption names, or any stuff.

    Args:
        work: folder of the probe's checkpoint.
        tokens_of: row numbers -> features of their patches, float32 (rows, 256, d).
        named_nc: bool (n, c).
        steps: of the probe's training.
    """
    torch.manual_seed(7)
    probe = nn.Linear(tokens_of(np.arange(1)).shape[2], len(CLASSES))

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(named_nc), size=PROBE_BATCH))
        log_p = functional.log_softmax(probe(tokens_of(rows)), -1)
        inside = log_p.masked_fill(~with_stuff(named_nc[rows])[:, None], -1e4)
        owned = log_p.exp().topk(OWNED, dim=1).values.mean(1)
        present = owned.clamp_min(1e-4).log()[named_nc[rows]].mean()
        return -torch.logsumexp(inside, -1).mean() - present

    fit("probe", work, probe, loss_of, steps, rate=3e-2)
    labels = []
    with torch.no_grad():
        for rows in np.split(np.arange(len(named_nc)), range(512, len(named_nc), 512)):
            forbidden = ~with_stuff(named_nc[rows])[:, None]
            scores = probe(tokens_of(rows)).masked_fill(forbidden, -1e4)
            labels.append(scores.argmax(-1).to(torch.uint8))
    return torch.cat(labels)


def refine(name, arguments, backbone, pool, labels_np, key_weight):
    """Trains `backbone` in place; returns steps and seconds."""
    model = Probed(backbone)
    named = torch.from_numpy(pool.named_nc)
    weight = torch.tensor([1.0 if name in STUFF else 2.0 for name in CLASSES])

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(pool.captions), size=BATCH))
        images, flipped = jitter(images_to_torch(pool.images_nhwc[rows]), rng, with_flips=True)
        labels = labels_np[rows].long().unflatten(1, (GRID, GRID))
        labels = torch.where(flipped[:, None, None], labels.flip(-1), labels).flatten(1)
        images, source = mix_blocks(images, rng, share=0.3)
        labels = labels.gather(0, source)
        *outputs, _ = model(images)
        return probe_loss(outputs, labels, named[rows][source].any(1), weight, key_weight)

    return fit(name, arguments.work, model, loss_of, arguments.steps, rate=1e-3, decay=0.03)


def main():
    arguments = parse_arguments(__doc__, probe_steps=250, steps=500)
    work = arguments.work
    pool = load_pool(work, *POOLS)
    described = [describe_pool(work, name) for name in POOLS]
    first = len(described[0])

    def tokens_of(rows):
        # Rows ascend: those of the first pool come first.
        parts = described[0][rows[rows < first]], described[1][rows[rows >= first] - first]
        return torch.from_numpy(np.concatenate(parts)).float().flatten(2).mT

    named_nc = torch.from_numpy(pool.named_nc)
    labels_np = label_patches(work, tokens_of, named_nc, arguments.probe_steps)
    for name, kind, key_weight in (("dinov2", Dinov2Model, 0.0), ("dino", ViTModel, 1.0)):
        options = {} if kind is Dinov2Model else {"add_pooling_layer": False}
        torch.manual_seed(8)
        backbone = kind.from_pretrained(work / name, **options).float()
        facts = refine(f"{name}_refined", arguments, backbone, pool, labels_np, key_weight)
        note(work, **{f"{name}_refined": facts})
        save_vit(work / f"{name}_refined", backbone)


if __name__ == "__main__":
    main()
