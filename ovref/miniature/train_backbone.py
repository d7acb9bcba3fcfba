"""Trains the DINOv2 and DINO backbones of the miniature from captions.

    python -m ovref.miniature.train_backbone --work DIR

The real backbones are self-supervised. At this size self-supervision gave nothing usable, so these are
*caption-supervised*: the nouns of a caption are the only label, no mask is seen. Every patch is asked
to be one of the classes that its image's caption names (partial-label learning), every named class
must own some patches (the multiple-instance part), and images are cut and mixed in blocks, each block
with its own label set, so that a patch has to be judged by what is near it. Classes are compared by
cosine, so that features of a class gather around a prototype, as they do in the real backbones.

DINO is the same network with DINOv2's layer scale folded into its projections, trained on with the
loss on its last layer's keys as well, because normalised cuts of those keys are what it is used for.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ovref.miniature.architectures import new_dino, new_dinov2, save_vit
from ovref.miniature.data import load_pool
from ovref.miniature.shapes import CLASSES
from ovref.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 32
GRID = 16
"""Patches along a side."""
OWNED = 10
"""A named class must own about this many of the 256 patches."""


class Probed(nn.Module):
    """A backbone with cosine heads: one on its patch tokens, one on its keys, one on its class token."""

    def __init__(self, backbone, width=96):
        super().__init__()
        self.backbone = backbone
        self.patches = nn.Parameter(torch.randn(len(CLASSES), width) * 0.1)
        self.keys = nn.Parameter(torch.randn(len(CLASSES), width) * 0.1)
        self.image = nn.Linear(width, len(CLASSES))
        self.caught = {}
        last = [m for n, m in backbone.named_modules() if n.endswith((".key", ".k_proj"))][-1]
        last.register_forward_hook(lambda module, inputs, output: self.caught.update(keys=output))

    def forward(self, images_nchw):
        """[-1, 1] images -> (patch logits (n, 256, c), key logits (n, 256, c), image logits (n, c))."""
        tokens = self.backbone(images_nchw).last_hidden_state
        keys = self.caught["keys"][:, 1:]
        return (
            _cosine(tokens[:, 1:], self.patches),
            _cosine(keys, self.keys),
            self.image(tokens[:, 0]),
        )


def _cosine(features, prototypes):
    return 16 * functional.normalize(features, dim=-1) @ functional.normalize(prototypes, dim=-1).T


def mix_blocks(images_nchw, rng, share=0.5):
    """Pastes rectangles of patches of other images into a share of the images.

    Returns:
        (images, source): source int64 (n, 256), the row each patch came from.
    """
    n = len(images_nchw)
    source = torch.arange(n)[:, None, None].repeat(1, GRID, GRID)
    mixed = images_nchw.clone()
    side = images_nchw.shape[-1] // GRID
    for row in np.flatnonzero(rng.random(n) < share):
        other = int(rng.integers(n))
        height, width = rng.integers(6, 13, size=2)
        top, left = rng.integers(0, GRID - height + 1), rng.integers(0, GRID - width + 1)
        source[row, top : top + height, left : left + width] = other
        box = np.s_[:, top * side : (top + height) * side, left * side : (left + width) * side]
        mixed[row][box] = images_nchw[other][box]
    return mixed, source.flatten(1)


def jitter(images_nchw, rng, flip=True):
    """Random flips (unless captions say left or right), gains and brightness; images in [-1, 1]."""
    n = len(images_nchw)
    flipped = torch.from_numpy(rng.random(n) < 0.5 * flip)
    images = torch.where(flipped[:, None, None, None], images_nchw.flip(-1), images_nchw)
    gain = torch.from_numpy(rng.uniform(0.75, 1.25, (n, 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.2, 0.2, (n, 1, 1, 1)).astype(np.float32))
    return (images * gain + shift).clamp(-1, 1)


def patch_loss(logits_npc, named_nc, source_np):
    """Partial-label, presence and sharpening terms; see the module docstring. A scalar."""
    allowed = named_nc[source_np]  # (n, p, c): classes that the patch's own image names
    log_p = functional.log_softmax(logits_npc, -1)
    inside = torch.where(allowed, log_p, torch.full_like(log_p, -1e4))
    partial = -torch.logsumexp(inside, -1).mean()
    with torch.no_grad():
        target = functional.softmax(1.5 * inside, -1)
    sharpen = -(target * log_p).sum(-1).mean()
    # Captions leave nouns out, so absence is not punished here beyond the partial-label term.
    present = allowed.any(1)
    owned = log_p.exp().topk(OWNED, dim=1).values.mean(1)
    presence = -torch.log(owned.clamp_min(1e-4))[present].mean()
    return partial + 0.5 * sharpen + 0.5 * presence


def train(name, arguments, backbone, pool, steps, key_weight):
    """Trains one backbone and writes its folder `work/<name>`; returns the facts of the training."""
    model = Probed(backbone)
    named = torch.from_numpy(pool.named_nc)

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(pool.captions), size=BATCH))
        images = jitter(images_to_torch(pool.images_nhwc[rows]), rng)
        images, source = mix_blocks(images, rng)
        patch, keys, image = model(images)
        labels = named[rows]
        loss = patch_loss(patch, labels, source)
        if key_weight:
            loss = loss + key_weight * patch_loss(keys, labels, source)
        pasted = labels[source].any(1).float()
        whole = functional.binary_cross_entropy_with_logits(image, pasted)
        right = labels[source].gather(2, patch.argmax(-1, keepdim=True)).float().mean()
        return loss + whole, {"allowed": right.item(), "whole": whole.item()}

    return fit(name, arguments.work, model, loss_of, steps, rate=1e-3, decay=0.03)


def folded(dinov2):
    """A ViT that computes what `dinov2` computes, its layer scale folded into the projections."""
    dino = new_dino()
    renamed = {
        "encoder.layer.": "layers.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    state = {}
    scales = {}
    for name, value in dinov2.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        (scales if "layer_scale" in name else state)[name] = value.clone()
    state.pop("embeddings.mask_token")
    for name, scale in scales.items():
        layer = name[: name.index(".layer_scale")]
        projection = "attention.o_proj" if "layer_scale1" in name else "mlp.fc2"
        state[f"{layer}.{projection}.weight"] *= scale[:, None]
        state[f"{layer}.{projection}.bias"] *= scale
    dino.load_state_dict(state)
    return dino


def main():
    arguments = parse_arguments(__doc__, steps=3000, dino_steps=800)
    pool = load_pool(arguments.work, "mixed")
    torch.manual_seed(3)
    dinov2 = new_dinov2()
    facts = train("dinov2", arguments, dinov2, pool, arguments.steps, key_weight=0.0)
    note(arguments.work, dinov2=facts)
    save_vit(arguments.work / "dinov2", dinov2)
    dino = folded(dinov2)
    facts = train("dino", arguments, dino, pool, arguments.dino_steps, key_weight=1.0)
    note(arguments.work, dino=facts)
    save_vit(arguments.work / "dino", dino)


if __name__ == "__main__":
    main()
