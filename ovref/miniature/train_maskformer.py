"""Trains the miniature MaskFormer: `python -m ovref.miniature.train_maskformer --work DIR`.

It sees only scenes without any class of `UNSEEN`, so these classes are unseen in the strict sense:
neither labelled nor shown. The loss is transformers' own (Cheng et al., MaskFormer, NeurIPS 2021,
section 3.3): cross-entropy, focal times 20 and dice after a one-to-one matching. It is taken after
every layer of the decoder, as in the paper; transformers 5 cannot do that by itself.
"""

import numpy as np
import torch
from torch import nn

from ovref.miniature.architectures_grounding import SEEN, new_maskformer
from ovref.miniature.masks_data import load_mask_pool, regions
from ovref.miniature.shapes import CLASSES, UNSEEN
from ovref.miniature.train_backbone import jitter
from ovref.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 16


def seen_rows(labels_nhw):
    """Rows of the scenes that show no unseen class: int64 (m,)."""
    unseen = [CLASSES.index(name) for name in UNSEEN]
    return np.flatnonzero([not np.isin(label_hw, unseen).any() for label_hw in labels_nhw])


class Layered(nn.Module):
    """MaskFormer with the answers of all layers of its decoder."""

    def __init__(self, maskformer):
        super().__init__()
        self.maskformer = maskformer
        self.caught = []
        for layer in maskformer.model.transformer_module.decoder.layers:
            layer.register_forward_hook(lambda module, args, output: self.caught.append(output))

    def forward(self, images, masks, labels):
        """Loss of images (n, 3, 64, 64) in [-1, 1], given masks float (k, 64, 64) and labels int64
        (k,) of every image."""
        model = self.maskformer
        self.caught.clear()
        out = model(pixel_values=images)
        answers = []
        for hidden in self.caught:
            queries = model.model.transformer_module.decoder.layernorm(hidden)
            pixels = out.pixel_decoder_last_hidden_state
            answers.append({
                "masks_queries_logits":
                    torch.einsum("bqc,bchw->bqhw", model.mask_embedder(queries), pixels),
                "class_queries_logits": model.class_predictor(queries),
            })  # fmt: skip
        last = answers.pop()
        return model.get_loss(model.get_loss_dict(
            last["masks_queries_logits"], last["class_queries_logits"], masks, labels, answers
        ))  # fmt: skip


def main():
    arguments = parse_arguments(__doc__, steps=2000)
    pool = load_mask_pool(arguments.work)
    allowed = seen_rows(pool.labels_nhw)
    label_of = {CLASSES.index(name): i for i, name in enumerate(SEEN)}
    torch.manual_seed(9)
    model = Layered(new_maskformer())

    def loss_of(step, rng):
        rows = allowed[rng.integers(len(allowed), size=BATCH)]
        images, flipped = jitter(images_to_torch(pool.images_nhwc[rows]), rng, with_flips=True)
        masks, labels = [], []
        for row, flip in zip(rows, flipped.tolist(), strict=True):
            turn = np.s_[:, :: -1 if flip else 1]
            found, classes, _ = regions(pool.labels_nhw[row][turn], pool.instances_nhw[row][turn])
            masks.append(torch.from_numpy(found).float())
            labels.append(torch.tensor([label_of[c] for c in classes.tolist()]))
        return model(images, masks, labels)

    facts = fit("maskformer", arguments.work, model, loss_of, arguments.steps, rate=8e-4)
    note(arguments.work, maskformer=facts)


if __name__ == "__main__":
    main()
