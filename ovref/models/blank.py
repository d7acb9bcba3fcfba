"""Blank input for checking models before a build begins (`ovref.check_models`)."""

import io

import numpy as np
from PIL import Image

from ovref.records import Noun, Prompt

BLANK_HWC = np.full((64, 64, 3), 128, np.uint8)
"""A grey image, RGB."""


def blank_image() -> bytes:
    """The grey image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(BLANK_HWC).save(file, "PNG")
    return file.getvalue()


def blank_prompt() -> Prompt:
    """A caption with one noun, and the grey image."""
    noun = Noun(text="thing", start=2, end=7)
    return Prompt(
        key="blank", caption="a thing", nouns=(noun,), source="blank", image=blank_image()
    )
