"""Trains the CLIP of the miniature: `python -m ovref.miniature.train_clip --work DIR`.

Ordinary contrastive training of images and captions. A third of the captions is replaced by one of
CLIP's seven zero-shot templates around a noun of the caption, so that templates are
in-distribution. A template is true of every image of the batch whose caption names its noun; such
pairs are not negatives. No mask is seen.
"""

import numpy as np
import torch
from ovref_inference.retrieve import TEMPLATES
from torch.nn import functional

from ovref.miniature.architectures import new_clip, save_clip
from ovref.miniature.data import load_pool
from ovref.miniature.shapes import CLASSES
from ovref.miniature.tokenizer import save_tokenizer
from ovref.miniature.train_backbone import jitter
from ovref.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 64
TEMPLATE_SHARE = 0.35


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
    arguments = parse_arguments(__doc__, steps=2050)
    pool = load_pool(arguments.work, "single", "mixed")
    tokenizer = save_tokenizer(arguments.work / "tokenizer_clip", pad="!")
    captions = [tokenizer(c).input_ids for c in pool.captions]
    templates = [[tokenizer(t.format(name)).input_ids for name in CLASSES] for t in TEMPLATES]
    torch.manual_seed(4)
    model = new_clip()

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(captions), size=BATCH))
        images = functional.normalize(
            model.encode_image(jitter(images_to_torch(pool.images_nhwc[rows]), rng, flip=False)),
            dim=-1,
        )
        texts, also_true = [], torch.zeros(BATCH, BATCH, dtype=torch.bool)
        for column, row in enumerate(rows):
            if rng.random() < TEMPLATE_SHARE:
                noun = rng.choice(np.flatnonzero(pool.named_nc[row]))
                texts.append(templates[rng.integers(len(TEMPLATES))][noun])
                also_true[:, column] = torch.from_numpy(pool.named_nc[rows, noun])
            else:
                texts.append(captions[row])
        also_true |= torch.tensor([[a == b for b in texts] for a in texts])
        ids = torch.zeros(BATCH, max(map(len, texts)), dtype=torch.int64)
        for column, text in enumerate(texts):
            ids[column, : len(text)] = torch.tensor(text)
        logits = model.logit_scale.exp().clamp(max=60) * images @ encode_text(model, ids).T
        also_true.fill_diagonal_(False)
        logits = logits.masked_fill(also_true, -1e4)
        pairs = torch.arange(BATCH)
        loss = (
            functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)
        ) / 2
        return loss, {"hit": (logits.argmax(1) == pairs).float().mean().item()}

    facts = fit("clip", arguments.work, model, loss_of, arguments.steps, rate=1e-3, decay=0.05)
    note(arguments.work, clip=facts)
    save_clip(arguments.work / "clip", model)


if __name__ == "__main__":
    main()
