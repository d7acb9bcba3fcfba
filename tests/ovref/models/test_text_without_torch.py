"""CLIP's text tower in numpy against open_clip's, with the miniature's weights."""

import subprocess
import sys

import numpy as np
import pytest

from ovref_inference.encoders import TextEncoderConfig, load_text_encoder
from ovref_inference.encoders.text_without_torch import load_without_torch

CONFIG = TextEncoderConfig(model="miniature:clip")
TEXTS = ["tree", "the large brick wall.", "It's  RED,\tand 12 caf\u00e9s!", "tree " * 90, "x"]


def test_it_agrees_with_open_clip():
    wanted = load_text_encoder(CONFIG, device="cpu").encode(TEXTS)
    found = load_without_torch(CONFIG).encode(TEXTS)
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 2e-6


def test_torch_is_not_imported():
    code = (
        "import sys\nfrom ovref_inference.encoders.config import TextEncoderConfig as Config\n"
        "from ovref_inference.encoders.text_without_torch import load_without_torch\n"
        "print(load_without_torch(Config(model='miniature:clip')).encode(['tree']).shape)\n"
        "print([name for name in ('torch', 'transformers', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 64)\n[]\n"


@pytest.mark.parametrize("model", ["ViT-L-14:openai", "miniature:dinov2"])
def test_other_models_are_left_to_open_clip(model):
    assert load_without_torch(TextEncoderConfig(model=model)) is None
