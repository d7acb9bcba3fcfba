"""Trains the miniature MaskFormer: `python -m recipes.miniature.train_maskformer --work DIR`.

It sees only scenes without any class of `UNSEEN`, so these classes are unseen in the strict sense:
neither labelled nor shown. The loss is transformers' own (Cheng et al., MaskFormer, NeurIPS 2021,
section 3.3): cross-entropy, focal times 20 and dice after a one-to-one matching. It is taken after
every layer of the decoder, as in the paper; transformers 5 cannot do that by itself. A linear head
on the pixel embeddings, discarded after training, predicts the class of each pixel, so that these
learn from the first step on.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ovref.miniature.shapes import CLASSES, UNSEEN
from recipes.miniature.architectures_grounding import SEEN, new_maskformer
from recipes.miniature.masks_data import load_mask_pool, regions
from recipes.miniature.train_backbone import jitter
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 8


def seen_rows(labels_nhw):
    """Rows of the scenes that show no unseen class: int64 (m,)."""
    unseen = [CLASSES.index(name) for name in UNSEEN]
    return np.flatnonzero([not np.isin(label_hw, unseen).any() for label_hw in labels_nhw])


class Layered(nn.Module):
    """MaskFormer with the answers of all layers of its decoder, and with the head on its pixels."""

    def __init__(self, maskformer):
        super().__init__()
        self.maskformer = maskformer
        self.pixels = nn.Conv2d(maskformer.config.mask_feature_size, len(SEEN), 1)
        self.caught = []
        for layer in maskformer.model.transformer_module.decoder.layers:
            layer.register_forward_hook(lambda module, args, output: self.caught.append(output))

    def forward(self, images, masks, labels, label_nhw):
        """Loss and facts to log.

        Args:
            images: (n, 3, 64, 64) in [-1, 1].
            masks: of every image, float (k, 64, 64).
            labels: of every image, int64 (k,) positions in SEEN.
            label_nhw: int64 (n, 32, 32), the same per pixel of the embeddings.
        """
        model = self.maskformer
        self.caught.clear()
        pixels = model(pixel_values=images).pixel_decoder_last_hidden_state
        answers = []
        for hidden in self.caught:
            queries = model.model.transformer_module.decoder.layernorm(hidden)
            embedded = model.mask_embedder(queries)
            answers.append({
                "masks_queries_logits": torch.einsum("bqc,bchw->bqhw", embedded, pixels),
                "class_queries_logits": model.class_predictor(queries),
            })  # fmt: skip
        last = answers.pop()
        losses = model.get_loss_dict(
            last["masks_queries_logits"], last["class_queries_logits"], masks, labels, answers
        )
        guessed = self.pixels(pixels)
        facts = {k: losses[f"loss_{k}"].item() for k in ("cross_entropy", "mask", "dice")}
        facts["pixel_right"] = (guessed.argmax(1) == label_nhw).float().mean().item()
        return model.get_loss(losses) + 2 * functional.cross_entropy(guessed, label_nhw), facts


def main():
    arguments = parse_arguments(__doc__, steps=2000)
    pool = load_mask_pool(arguments.work)
    allowed = seen_rows(pool.labels_nhw)
    label_of = np.array([SEEN.index(name) if name in SEEN else -1 for name in CLASSES])
    torch.manual_seed(9)
    model = Layered(new_maskformer())

    def loss_of(step, rng):
        rows = allowed[rng.integers(len(allowed), size=BATCH)]
        images, flipped = jitter(images_to_torch(pool.images_nhwc[rows]), rng, with_flips=True)
        masks, labels, per_pixel = [], [], []
        for row, flip in zip(rows, flipped.tolist(), strict=True):
            turn = np.s_[:, :: -1 if flip else 1]
            label_hw = pool.labels_nhw[row][turn]
            found, classes, _ = regions(label_hw, pool.instances_nhw[row][turn])
            masks.append(torch.from_numpy(found).float())
            labels.append(torch.from_numpy(label_of[classes]))
            per_pixel.append(torch.from_numpy(label_of[label_hw[::2, ::2]]))
        return model(images, masks, labels, torch.stack(per_pixel))

    facts = fit("maskformer", arguments.work, model, loss_of, arguments.steps, rate=8e-4)
    note(arguments.work, maskformer=facts)


if __name__ == "__main__":
    main()
