"""Colours of labels, the same in every picture and label map."""

import numpy as np


def class_palette(classes: int) -> np.ndarray:
    """Colours of labels, (classes + 1, 3) uint8; the last one, white, is for unlabelled pixels.

    Hues are spread by the golden ratio, so that neighbouring labels differ; lightness and
    saturation alternate over three levels.
    """
    index = np.arange(classes)
    hue = (index * 0.618034 + 0.55) % 1.0
    saturation = np.array([0.72, 0.5, 0.85])[index % 3]
    value = np.array([0.86, 0.72, 0.55])[(index // 2) % 3]
    # HSV to RGB: each channel is a clipped triangle wave of the hue.
    channel = np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    rgb = value[:, None] * (1 - saturation[:, None] * (1 - np.clip(channel, 0, 1)))
    return np.concatenate([np.round(rgb * 255), [[255, 255, 255]]]).astype(np.uint8)
