"""Training continues from the shipped weights."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from ovref.miniature.shapes import CLASSES  # noqa: E402
from ovref_miniature import weights_path  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SHIPPED = (
    "stable_diffusion/unet/diffusion_pytorch_model.safetensors",
    "stable_diffusion/vae/diffusion_pytorch_model.safetensors",
    "stable_diffusion/text_encoder/model.safetensors",
    "clip/open_clip_model.safetensors",
    "classifier/model.safetensors",
)


def test_restarted_weights_are_exported_unchanged(tmp_path):
    from recipes.miniature.export import export
    from recipes.miniature.restart import restart

    weights = weights_path("clip").parent
    names = restart(tmp_path / "work", weights)
    assert names == ["vae", "diffusion", "clip", "classifier"]
    assert restart(tmp_path / "work", weights) == [], "checkpoints that are there stay"
    done = export(tmp_path / "work", tmp_path / "weights")
    known = json.loads((weights / "training.json").read_text())
    assert {name: facts["steps"] for name, facts in done.items()} == {
        name: known[name]["steps"] for name in names
    }
    for path in SHIPPED:
        old, new = load_file(weights / path), load_file(tmp_path / "weights" / path)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    "caption, things",
    [
        ("a red cactus on the sand", ["cactus"]),
        ("two cacti on the sand", ["cactus"]),
        ("three fish in the water", ["fish"]),
        ("a traffic light next to a car on the road.", ["traffic light", "car"]),
    ],
)
def test_a_swapped_caption_names_another_thing(caption, things):
    from recipes.miniature.train_clip import swapped

    stuff = [name for name in ("sand", "water", "road") if name in caption]
    named = np.isin(CLASSES, [*things, *stuff])
    for seed in range(20):
        other = swapped(caption, named, np.random.default_rng(seed))
        assert other != caption
        assert sum(thing in other for thing in things) <= len(things) - 1 or "cacti" in caption
        assert all(name in other for name in stuff)


def test_a_caption_without_things_has_no_swap():
    from recipes.miniature.train_clip import swapped

    named = np.isin(CLASSES, ["sky", "grass"])
    assert swapped("a blue sky above the grass", named, np.random.default_rng(0)) is None
