"""Trains the convolutional CLIP of the miniature: `python -m recipes.miniature.train_clip_convnext
--work DIR`.

A small ConvNeXt learns the joint space of `miniature:clip`, whose text tower it takes and leaves as
it is (as in LiT: Zhai et al., CVPR 2022): images against captions, and single cells of its last map
against the nouns of the captions, so that cells pooled under a mask can be compared with texts. For
each noun the two best cells of an image count. No mask is seen.
"""

import numpy as np
import torch
from torch.nn import functional

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, STUFF
from ovref_inference.collection.retrieve import TEMPLATES
from ovref_inference.encoders import cnn_towers
from ovref_inference.encoders.clip_towers import load_clip
from recipes.miniature.architectures import CONVNEXT_CONFIG, new_clip_convnext, save_clip
from recipes.miniature.data import load_pool
from recipes.miniature.tokenizer import save_tokenizer
from recipes.miniature.train_backbone import jitter
from recipes.miniature.train_clip import encode_text, padded
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 32
SIZE = 192
"""Pixels that scenes are enlarged to: the last map has 6 x 6 cells."""
SCALE = 20.0
"""Factor of the cosines of cells and nouns."""
BEST = 2
"""Cells that count for a noun."""


def text_embeddings(clip, tokenizer, texts, at_once=256):
    """(n, d) float32, normalised."""
    found = []
    for start in range(0, len(texts), at_once):
        ids = [tokenizer(text).input_ids for text in texts[start : start + at_once]]
        with torch.no_grad():
            found.append(encode_text(clip, padded(ids)))
    return torch.cat(found)


def noun_embeddings(clip, tokenizer):
    """(classes, d): the mean over CLIP's templates, normalised."""
    texts = [template.format(name) for name in CLASSES for template in TEMPLATES]
    found = text_embeddings(clip, tokenizer, texts).unflatten(0, (len(CLASSES), -1)).mean(1)
    return functional.normalize(found, dim=1)


def cells_of(visual, images_nchw):
    """(n, cells, c) of the last map, and the layer that brings rows to the joint space."""
    images_nchw = functional.interpolate(images_nchw, (SIZE, SIZE), mode="bilinear")
    return cnn_towers.pyramid(visual, images_nchw)[-1].flatten(2).mT, cnn_towers.trunk_head(visual)


def noun_loss(cells_nld, nouns_cd, named_nc):
    """Cross-entropy of whether an image has a noun, from the softmax over all nouns in each cell:
    nouns that the caption names and all others weigh the same."""
    shares = (SCALE * functional.normalize(cells_nld, dim=2) @ nouns_cd.T).softmax(2)
    best = shares.topk(BEST, dim=1).values.mean(1).clamp(1e-4, 1 - 1e-4)
    found, absent = -best[named_nc].log().mean(), -(1 - best[~named_nc]).log().mean()
    return found + absent * (~named_nc).sum() / named_nc.sum()


@torch.no_grad()
def region_accuracy(visual, nouns_cd, scenes=200):
    """Share of the true regions of validation scenes that are named right, of stuff and of things,
    each pooled as FC-CLIP does it: the mean of the cells that it covers, brought to the joint
    space."""
    right = {"stuff": [], "things": []}
    for seed in range(scenes):
        scene = render(seed, "validation")
        cells, head = cells_of(visual, images_to_torch(scene.image_hwc[None]))
        side = round(cells.shape[1] ** 0.5)
        numbers_hw = scene.instance_hw.astype(int) * 100 + scene.label_hw
        for number in np.unique(numbers_hw):
            mask = torch.from_numpy(numbers_hw == number).float()
            share = functional.adaptive_avg_pool2d(mask[None], (side, side)).flatten()
            pooled = share @ cells[0] / share.sum()
            guess = (functional.normalize(head(pooled[None]), dim=1) @ nouns_cd.T).argmax().item()
            label = int(number % 100)
            right["stuff" if label < len(STUFF) else "things"].append(guess == label)
    return {kind: round(sum(each) / len(each), 3) for kind, each in right.items()}


def main():
    arguments = parse_arguments(__doc__, steps=600)
    pool = load_pool(arguments.work, "single", "mixed")
    tokenizer = save_tokenizer(arguments.work / "tokenizer_clip", pad="!")
    torch.manual_seed(12)
    clip, model = load_clip("miniature:clip", "")[0], new_clip_convnext()
    own = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    model.load_state_dict(own, strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # or the blocks would begin as next to nothing
            torch.nn.init.constant_(parameter, 0.3)
    captions_nd = text_embeddings(clip, tokenizer, pool.captions)
    nouns_cd = noun_embeddings(clip, tokenizer)
    print(f"{len(captions_nd)} captions", flush=True)

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(captions_nd), size=BATCH))
        images = jitter(images_to_torch(pool.images_nhwc[rows]), rng, flip=False)
        cells, head = cells_of(model.visual, images)
        whole = functional.normalize(head(cells.mean(1)), dim=1)
        texts = captions_nd[torch.from_numpy(rows)]
        logits = clip.logit_scale.exp().clamp(max=60).detach() * whole @ texts.T
        same = torch.tensor(
            [[pool.captions[a] == pool.captions[b] and a != b for b in rows] for a in rows]
        )
        pairs = torch.arange(BATCH)
        contrast = functional.cross_entropy(logits.masked_fill(same, -1e4), pairs)
        named = torch.from_numpy(pool.named_nc[rows])
        joint = head(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])
        nouns = noun_loss(joint, nouns_cd, named)
        return contrast + nouns, {"contrast": contrast.item(), "nouns": nouns.item()}

    facts = fit(
        "clip_convnext", arguments.work, model, loss_of, arguments.steps, rate=2e-3, save_every=50
    )
    facts["regions_right"] = region_accuracy(model.visual, nouns_cd)
    print(facts, flush=True)
    note(arguments.work, clip_convnext=facts)
    save_clip(arguments.work / "clip_convnext", model, CONVNEXT_CONFIG)


if __name__ == "__main__":
    main()
