"""Trains the CLIP of the miniature: `python -m recipes.miniature.train_clip --work DIR`.

Ordinary contrastive training of images and captions. A third of the captions is replaced by one of
CLIP's seven zero-shot templates around a noun of the caption, so that templates are
in-distribution. A template is true of every image of the batch whose caption names its noun; such
pairs are not negatives. Two additions make such a small model learn shapes, which it learns last
from images and captions alone: hard negatives, captions in which one thing is replaced (as in
NegCLIP), and imitation of the DINOv2 miniature by the patch tokens before the last block. No mask
is seen.
"""

import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ovref.miniature.captions import plural
from ovref.miniature.shapes import CLASSES, STUFF
from ovref_inference.collection.retrieve import TEMPLATES
from recipes.miniature.architectures import CLIP_CONFIG, VIT_WIDTH, new_clip, save_clip
from recipes.miniature.data import load_pool
from recipes.miniature.tokenizer import save_tokenizer
from recipes.miniature.train_backbone import describe_pool, jitter
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 64
TEMPLATE_SHARE = 0.35
SWAPS = 3
"""Number of false copies of a caption that names a thing."""
IMITATION = 1.0
"""Weight of the imitation of DINOv2's patch features, one minus cosine."""


class Imitating(nn.Module):
    """A CLIP and the head that its patch tokens imitate DINOv2 with."""

    def __init__(self):
        super().__init__()
        self.clip = new_clip()
        self.imitate = nn.Linear(CLIP_CONFIG["vision_cfg"]["width"], VIT_WIDTH)
        self.caught = {}
        self.clip.visual.transformer.resblocks[-2].register_forward_hook(
            lambda module, inputs, output: self.caught.update(tokens=output)
        )

    def forward(self, images_nchw):
        """Image embeddings (n, d), normalised, and guessed DINOv2 features (n, 96, 8, 8)."""
        images = functional.normalize(self.clip.encode_image(images_nchw), dim=-1)
        guess = self.imitate(self.caught.pop("tokens")[:, 1:])
        return images, guess.transpose(1, 2).unflatten(2, (8, 8))


def swapped(caption, named_c, rng):
    """`caption` with one of its things replaced by an absent one; None if it names no thing."""
    present = [c for c in np.flatnonzero(named_c) if c >= len(STUFF)]
    if not present:
        return None
    old = CLASSES[rng.choice(present)]
    absent = [CLASSES[c] for c in range(len(STUFF), len(CLASSES)) if not named_c[c]]
    new = str(rng.choice(absent))
    if plural(old) != old and plural(old) in caption:
        return re.sub(rf"\b{plural(old)}\b", plural(new), caption)
    return re.sub(rf"\b{old}\b", new, caption)


def padded(texts):
    """(texts, longest) int64: the ids of each text, then zeros."""
    ids_nl = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_nl[row, : len(text)] = torch.tensor(text)
    return ids_nl


def encode_text(model, ids_nl):
    """Text embeddings (n, d), normalised, of ids cut to the longest text of the batch.

    Equal to `model.encode_text(..., normalize=True)` on ids padded to the full context: attention
    is causal, so padding after the end token cannot change it. Cutting it off saves most work.
    """
    length = ids_nl.shape[1]
    x = model.token_embedding(ids_nl) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return functional.normalize(
        x[torch.arange(len(x)), ids_nl.argmax(-1)] @ model.text_projection, dim=-1
    )


def main():
    arguments = parse_arguments(__doc__, steps=4000)
    pool = load_pool(arguments.work, "single", "mixed")
    tokenizer = save_tokenizer(arguments.work / "tokenizer_clip", pad="!")
    captions = [tokenizer(c).input_ids for c in pool.captions]
    described = [describe_pool(arguments.work, name) for name in ("single", "mixed")]
    singles = len(described[0])
    templates = [[tokenizer(t.format(name)).input_ids for name in CLASSES] for t in TEMPLATES]
    torch.manual_seed(4)
    model = Imitating()

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(captions), size=BATCH))
        images, guess = model(jitter(images_to_torch(pool.images_nhwc[rows]), rng, flip=False))
        # Rows are sorted: those of the first pool come first.
        first = rows < singles
        true = np.concatenate([described[0][rows[first]], described[1][rows[~first] - singles]])
        true = functional.avg_pool2d(torch.from_numpy(true).float(), 2)
        imitation = 1 - functional.cosine_similarity(guess, true).mean()
        texts, also_true = [], torch.zeros(BATCH, BATCH, dtype=torch.bool)
        untrue, owners = [], []
        for column, row in enumerate(rows):
            if rng.random() < TEMPLATE_SHARE:
                noun = rng.choice(np.flatnonzero(pool.named_nc[row]))
                texts.append(templates[rng.integers(len(TEMPLATES))][noun])
                also_true[:, column] = torch.from_numpy(pool.named_nc[rows, noun])
            else:
                texts.append(captions[row])
            for _ in range(SWAPS):
                text = swapped(pool.captions[row], pool.named_nc[row], rng)
                if text is not None:
                    untrue.append(tokenizer(text).input_ids)
                    owners.append(column)
        also_true |= torch.tensor([[a == b for b in texts] for a in texts])
        words = texts + untrue
        encoded = encode_text(model.clip, padded(words))
        logits = model.clip.logit_scale.exp().clamp(max=60) * images @ encoded.T
        also_true.fill_diagonal_(False)
        # A false copy is a negative only of its own image: others may show what it says.
        others = torch.arange(BATCH)[:, None] != torch.tensor(owners)[None]
        logits = logits.masked_fill(torch.cat([also_true, others], 1), -1e4)
        pairs = torch.arange(BATCH)
        loss = functional.cross_entropy(logits, pairs)
        loss = (loss + functional.cross_entropy(logits[:, :BATCH].T, pairs)) / 2
        hit = (logits.argmax(1) == pairs).float().mean().item()
        return loss + IMITATION * imitation, {"hit": hit, "imitation": imitation.item()}

    facts = fit("clip", arguments.work, model, loss_of, arguments.steps, rate=1e-3, decay=0.05)
    note(arguments.work, clip=facts)
    save_clip(arguments.work / "clip", model.clip)


if __name__ == "__main__":
    main()
