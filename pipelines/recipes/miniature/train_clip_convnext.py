"""Trains the convolutional CLIP of the miniature: `python -m recipes.miniature.train_clip_convnext
--work DIR`.

A small ConvNeXt learns the joint space of `miniature:clip`, whose text tower it takes and leaves as
it is (as in LiT: Zhai et al., CVPR 2022). From images and captions alone it learnt stuff and no
things (docs/what-did-not-work.md). So every patch gets a label, as for the transformers of the
miniature: a linear probe on the patches of `miniature:dinov2`, fitted to captions alone,
says which noun of the caption (or which stuff) each of them is. Cells of the last map, and their
means over the patches of a class as FC-CLIP pools them, are compared with the texts of all nouns;
whole images with captions. No mask is seen.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Dinov2Model

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, STUFF
from ovref_inference.collection.retrieve import TEMPLATES
from ovref_inference.encoders import cnn_towers
from ovref_inference.encoders.clip_towers import load_clip
from ovref_miniature import weights_path
from recipes.miniature.architectures import CONVNEXT_CONFIG, new_clip_convnext, save_clip
from recipes.miniature.data import load_pool
from recipes.miniature.refine_backbone import label_patches
from recipes.miniature.tokenizer import save_tokenizer
from recipes.miniature.train_backbone import GRID, jitter
from recipes.miniature.train_clip import encode_text, padded
from recipes.miniature.training import Muon, fit, images_to_torch, note, parse_arguments

POOLS = {"single": 4096, "mixed": 8192}
"""Scenes of each pool that are used: to label them takes a hundredth of a second each."""
BATCH = 16
SIZE = 192
"""Pixels that scenes are enlarged to: the last map has 6 x 6 cells."""
CUT, CUT_SIZE = 11, 128
"""Patches along a side of squares that are cut out of scenes, and pixels that these are enlarged
to."""
CUTS = 0.86
"""Part of the steps that are made with squares, at half the cost; the others see whole scenes."""
SCALE = 20.0
"""Factor of the cosines of features and nouns."""
LEAST = 1.0
"""Cells that a class must cover to be compared as a region."""
WEIGHTS = torch.tensor([1.0 if name in STUFF else 3.0 for name in CLASSES])
"""What classes weigh: things cover a fifth of the cells and are the harder part."""
CONTRAST = 0.5
"""Weight of the loss of whole images and captions."""


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


def load_scenes(work):
    """The first POOLS scenes: images uint8 (n, 64, 64, 3), captions, and the classes that captions
    name, bool (n, c)."""
    pools = [(load_pool(work, name), count) for name, count in POOLS.items()]
    images = np.concatenate([pool.images_nhwc[:count] for pool, count in pools])
    captions = [caption for pool, count in pools for caption in pool.captions[:count]]
    return images, captions, np.concatenate([pool.named_nc[:count] for pool, count in pools])


def labels_of(work, images_nhwc, named_nc, steps):
    """Class of every patch of the scenes, uint8 (n, 16, 16), by DINOv2's features; made once."""
    path = work / "patch_labels.npy"
    if not path.is_file():
        dinov2 = Dinov2Model.from_pretrained(weights_path("dinov2"), dtype=torch.float32).eval()

        @torch.no_grad()
        def tokens_of(rows):
            images = images_to_torch(images_nhwc[rows])
            return torch.cat([dinov2(x).last_hidden_state[:, 1:] for x in images.split(64)])

        found = label_patches(work, tokens_of, torch.from_numpy(named_nc), steps)
        np.save(path, found.unflatten(1, (GRID, GRID)).numpy())
    return np.load(path)


@torch.no_grad()
def enliven(visual):
    """Initialises a ConvNeXt so that its few blocks do something from the first step: weights by
    their number of inputs, and layer scales of 1 (timm's begin as next to nothing)."""
    for module in visual.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    for name, parameter in visual.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1.0)


def cut(images_nchw, labels_nhw, rng):
    """A square of CUT x CUT patches of each scene, around a patch of a thing if there is one, and
    its labels."""
    images, labels = [], []
    side = images_nchw.shape[-1] // GRID
    for image, label in zip(images_nchw, labels_nhw, strict=True):
        shown = np.argwhere(label >= len(STUFF))
        middle = shown[rng.integers(len(shown))] if len(shown) else rng.integers(GRID, size=2)
        corner = middle - rng.integers(2, CUT - 2, size=2)
        top, left = np.clip(corner, 0, GRID - CUT)
        labels.append(label[top : top + CUT, left : left + CUT])
        top, left, across = top * side, left * side, CUT * side
        images.append(image[:, top : top + across, left : left + across])
    return torch.stack(images), np.stack(labels)


def cells_of(visual, images_nchw, size=SIZE):
    """(n, cells, c) of the last map, and the layer that brings rows to the joint space."""
    images_nchw = functional.interpolate(images_nchw, (size, size), mode="bilinear")
    images_nchw = images_nchw.contiguous(memory_format=torch.channels_last)
    return cnn_towers.pyramid(visual, images_nchw)[-1].flatten(2).mT, cnn_towers.trunk_head(visual)


def shares_of(labels_nhw, cells):
    """float32 (n, classes, cells): the part of each cell that each class covers."""
    side = round(cells**0.5)
    one_hot = functional.one_hot(torch.from_numpy(labels_nhw).long(), len(CLASSES))
    return functional.adaptive_avg_pool2d(one_hot.permute(0, 3, 1, 2).float(), side).flatten(2)


def noun_logits(head, features_nd, nouns_cd):
    """(n, classes) of features of the last map."""
    return SCALE * functional.normalize(head(features_nd), dim=1) @ nouns_cd.T


def region_features(cells_nld, shares_ncl):
    """Means of the cells over what each class covers in an image: (regions, d), and the classes."""
    covered_nc = shares_ncl.sum(2)
    image, label = (covered_nc >= LEAST).nonzero(as_tuple=True)
    pooled = torch.einsum("rl,rld->rd", shares_ncl[image, label], cells_nld[image])
    return pooled / covered_nc[image, label][:, None], label


def region_loss(cells_nld, head, shares_ncl, nouns_cd):
    """Cross-entropy of the regions' classes, and the share of things that are named right."""
    pooled, label = region_features(cells_nld, shares_ncl)
    logits = noun_logits(head, pooled, nouns_cd)
    thing = label >= len(STUFF)
    right = (logits.argmax(1) == label)[thing].float().mean().item()
    return functional.cross_entropy(logits, label, WEIGHTS), right


def cell_loss(cells_nld, head, shares_ncl, nouns_cd):
    """Cross-entropy of single cells, which are of a class as far as it covers them."""
    log_p = noun_logits(head, cells_nld.flatten(0, 1), nouns_cd).log_softmax(1)
    target = shares_ncl.mT.flatten(0, 1) * WEIGHTS
    return -(target * log_p).sum() / target.sum()


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
            guess = noun_logits(head, pooled[None], nouns_cd).argmax().item()
            label = int(number % 100)
            right["stuff" if label < len(STUFF) else "things"].append(guess == label)
    return {kind: round(sum(each) / len(each), 3) for kind, each in right.items()}


def main():
    arguments = parse_arguments(__doc__, probe_steps=60, steps=1100)
    images_nhwc, captions, named_nc = load_scenes(arguments.work)
    labels_nhw = labels_of(arguments.work, images_nhwc, named_nc, arguments.probe_steps)
    tokenizer = save_tokenizer(arguments.work / "tokenizer_clip", pad="!")
    torch.manual_seed(12)
    clip, model = load_clip("miniature:clip", "")[0], new_clip_convnext()
    own = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    model.load_state_dict(own, strict=False)
    visual = model.visual.to(memory_format=torch.channels_last)
    enliven(visual)
    captions_nd = text_embeddings(clip, tokenizer, captions)
    nouns_cd = noun_embeddings(clip, tokenizer)
    print(f"{len(captions)} captions", flush=True)

    def contrast_of(whole_nd, rows):
        """Cross-entropy of which caption is an image's; those with the same words are left out."""
        texts = captions_nd[torch.from_numpy(rows)]
        logits = clip.logit_scale.exp().clamp(max=60).detach() * whole_nd @ texts.T
        same = torch.tensor([[captions[a] == captions[b] and a != b for b in rows] for a in rows])
        return functional.cross_entropy(logits.masked_fill(same, -1e4), torch.arange(BATCH))

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(captions), size=BATCH))
        images, labels = images_nhwc[rows], labels_nhw[rows]
        images = jitter(images_to_torch(images), rng, flip=False)
        whole = step >= CUTS * arguments.steps
        if not whole:
            images, labels = cut(images, labels, rng)
        cells, head = cells_of(visual, images, SIZE if whole else CUT_SIZE)
        shares = shares_of(labels, cells.shape[1])
        regions, things = region_loss(cells, head, shares, nouns_cd)
        singles, contrast = cell_loss(cells, head, shares, nouns_cd), torch.zeros(())
        if whole:
            contrast = contrast_of(functional.normalize(head(cells.mean(1)), dim=1), rows)
        facts = {"contrast": contrast.item(), "regions": regions.item(), "cells": singles.item()}
        return regions + singles + CONTRAST * contrast, facts | {"things": things}

    facts = fit(
        "clip_convnext", arguments.work, model, loss_of, arguments.steps, rate=2e-3,
        save_every=50, optimiser=Muon,
    )  # fmt: skip
    facts["regions_right"] = region_accuracy(visual, nouns_cd)
    print(facts, flush=True)
    note(arguments.work, clip_convnext=facts)
    save_clip(arguments.work / "clip_convnext", model, CONVNEXT_CONFIG)


if __name__ == "__main__":
    main()
