"""A collection of vectors of your own, and a backbone of your own: python own_vectors.py OUTPUT

The backbone here gives mean colours, so that it runs anywhere; put your own in its place.
"""

import sys

import numpy as np

import ovref
import ovref_inference
from ovref.stages.embed import Embed
from ovref_inference.encoders import TextEncoderConfig, VisualEncoderConfig


class MeanColours:
    """Colours of an 8 x 8 grid, and a constant so that black has a direction."""

    def encode(self, images):
        rows = [
            [[np.append(cell.mean((0, 1)), 255) for cell in np.array_split(row, 8, axis=1)]
             for row in np.array_split(image_hwc, 8)] for image_hwc in images
        ]  # fmt: skip
        return np.float32(rows) / 255


def main(output: str) -> np.ndarray:
    """Three colours as nouns; returns the labels of a picture of two of them."""
    ovref_inference.register_backbone("mean_colours", lambda config, device: MeanColours())
    rng = np.random.default_rng(0)
    colours = {"grass": (40, 160, 40), "sky": (90, 150, 250), "brick wall": (170, 60, 40)}
    nouns = [noun for noun in colours for _ in range(30)]
    vectors = np.array([(*colours[noun], 255) for noun in nouns]) / 255
    vectors[:, :3] += 0.03 * rng.standard_normal((len(nouns), 3))
    ovref.collection_from_arrays(
        output,
        ovref.OwnArrays(visual=vectors, nouns=nouns),
        Embed(
            visual=VisualEncoderConfig(model="own:mean_colours", size_hw=(64, 64)),
            text=TextEncoderConfig(model="miniature:clip"),
        ),
        licences=["colours: CC0-1.0"],
    )
    picture = np.full((64, 64, 3), colours["sky"], np.uint8)
    picture[32:] = colours["grass"]
    segmenter = ovref_inference.open(output).segmenter("fossil")
    (found,) = segmenter.segment([picture], ["sky", "grass", "brick wall"])
    print("top:", found.labels_hw[5, 30], "bottom:", found.labels_hw[60, 30])
    return found.labels_hw


if __name__ == "__main__":
    main(sys.argv[1])
