"""Captions of the miniature's world."""

import numpy as np

from ovref.miniature.scenes import SPLITS, caption_of, combinations, draw_layout


def sample_captions(n, seed, split="train"):
    """Captions without images, for corpora: a list of n (caption, nouns), always the same."""
    combinations(split)
    captions = []
    for index in range(n):
        rng = np.random.default_rng([SPLITS.index(split), seed, index, 1])
        captions.append(caption_of(draw_layout(rng, split), rng))
    return captions
