"""The safety classifier: a tiny one of transformers, made here, with random weights."""

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ovref.errors import ModelError
from ovref.models.safety import load_safety
from ovref.ops.measures import SafetySpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, id2label={0: "normal", 1: "NSFW", 2: "hentai"},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("safety")
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(path)
    return path


def test_probabilities_of_unsafe_labels_are_added_up(folder):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, size, np.uint8) for size in ((9, 12, 3), (8, 8, 3), (30, 5, 3))]
    found = load_safety(SafetySpec(model=str(folder)), "cpu")(images)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = ViTImageProcessor.from_pretrained(folder)
    for image_hwc, unsafe in zip(images, found, strict=True):
        with torch.no_grad():
            logits = model(**processor(images=image_hwc, return_tensors="pt")).logits[0]
        assert unsafe == pytest.approx(float(logits.softmax(-1)[1:].sum()), abs=1e-5)
    one = load_safety(SafetySpec(model=str(folder), unsafe=("hentai", "gore")), "cpu")(images)
    assert (one < found).all() and len(load_safety(SafetySpec(model=str(folder)), "cpu")([])) == 0


def test_what_is_no_such_classifier_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="normal, NSFW, hentai, none of which is unsafe"):
        load_safety(SafetySpec(model=str(folder), unsafe=("gore",)))
    with pytest.raises(ModelError, match="cannot load the safety classifier"):
        load_safety(SafetySpec(model=str(tmp_path)))
