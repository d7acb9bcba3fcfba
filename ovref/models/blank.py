"""The input on which models are tried before a build begins (`ovref.check_models`)."""

import io

import numpy as np
from PIL import Image

from ovref.records import Noun, Prompt

BLANK_HWC = np.full((64, 64, 3), 128, np.uint8)
"""A grey image, RGB."""


def blank_prompt() -> Prompt:
    """A caption of one noun, with the grey image."""
    file = io.BytesIO()
    Image.fromarray(BLANK_HWC).save(file, "PNG")
    noun = Noun(text="thing", start=2, end=7)
    return Prompt(
        key="blank", caption="a thing", nouns=(noun,), source="blank", image=file.getvalue()
    )
