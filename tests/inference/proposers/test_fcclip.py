"""FC-CLIP as a proposer, step by step from its parts, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import interpolate, pad

from fcclip_folder import DIM, TOWERS, write_fcclip
from ovref_inference.encoders import cnn_towers
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import load_visual_encoder
from ovref_inference.errors import ModelError
from ovref_inference.proposers.config import FcClipConfig, ProposerConfig
from ovref_inference.proposers.fcclip import SETTINGS, load_fcclip, region_embeddings
from ovref_inference.proposers.load import load_proposals, load_proposer

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (80, 100, 3), dtype=np.uint8),
          RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)]  # fmt: skip


@pytest.fixture(scope="module", params=TOWERS)
def folder(request, tmp_path_factory):
    return write_fcclip(tmp_path_factory.mktemp("fcclip") / request.param, request.param)


def normalisation(folder):
    text = Path(folder, "clip", "open_clip_config.json").read_text()
    return json.loads(text)["preprocess_cfg"]["mean"], json.loads(text)["preprocess_cfg"]["std"]


def loaded(folder, **sizes):
    config = FcClipConfig(model=folder, **({"short_side": 64, "long_side": 96} | sizes))
    return load_fcclip(config, device="cpu")


@torch.no_grad()
def test_proposals_are_made_of_one_pass_of_the_frozen_clip(folder):
    it = loaded(folder)
    proposals = it.propose(IMAGES)
    clip = open_clip.create_model(f"local-dir:{folder}/clip").eval()
    mean, std = (torch.tensor(one)[:, None, None] for one in normalisation(folder))
    for image, found, inner in zip(IMAGES, proposals, [(64, 80), (64, 64)], strict=True):
        pixels = torch.tensor(image.transpose(2, 0, 1)[None]).float()
        if pixels.shape[2:] != inner:
            pixels = interpolate(pixels, inner, mode="bilinear", antialias=True)
        pixels = pad((pixels / 255 - mean) / std, (0, -inner[1] % 32, 0, 0))
        maps = cnn_towers.pyramid(clip.visual, pixels)
        layer = it._decoder(maps)[-1]
        shown = [q for q in range(5) if (layer.masks_bqhw[0, q] > 0).any()]
        assert found.mask_probs_nhw.shape == (len(shown), *image.shape[:2])
        for row, query in enumerate(shown):
            one = layer.masks_bqhw[:1, query : query + 1]
            large = interpolate(one, pixels.shape[2:], mode="bilinear")
            large = interpolate(large[..., :, : inner[1]], image.shape[:2], mode="bilinear")[0, 0]
            np.testing.assert_allclose(
                found.mask_probs_nhw[row], large.sigmoid().numpy(), atol=1e-5
            )
            one = layer.embeddings_bqd[0, query].numpy()
            np.testing.assert_allclose(
                found.open_classes.embeddings_nd[row], one / np.linalg.norm(one), atol=1e-5
            )
        assert found.open_classes.templates == ("a {}.",) and found.trained_names == (
            "tree",
            "boat",
        )
        assert found.features_nd.shape == (len(shown), DIM)
        assert found.features_of == f"{folder}/clip"


@torch.no_grad()
def test_features_of_regions_are_those_of_the_encoder_of_a_collection(folder):
    """Masks of whole cells: pooled from logits as from pixels."""
    encoder = load_visual_encoder(
        VisualEncoderConfig(model=f"{folder}/clip", library="open_clip", size_hw=(64, 96)),
        device="cpu",
    )
    image = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    masks = np.zeros((2, 64, 96), bool)
    masks[0, :32, :64] = masks[1, 32:, 64:] = True
    ((expected, _),) = encoder.encode_regions([image], [masks])
    clip = open_clip.create_model(f"local-dir:{folder}/clip").eval()
    mean, std = normalisation(folder)
    pixels = (image / 255 - mean) / std
    maps = cnn_towers.pyramid(clip.visual, torch.tensor(pixels.transpose(2, 0, 1)[None]).float())
    logits = torch.tensor(np.where(masks[:, ::4, ::4], 3.0, -3.0)).float()
    found = region_embeddings(clip.visual, maps[-1][0], logits)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # A mask that reaches no cell has its best.
    tiny = torch.full((1, 2, 3), -5.0)
    tiny[0, 1, 2] = -1.0
    best = region_embeddings(clip.visual, maps[-1][0], tiny)
    np.testing.assert_allclose(best[0], expected[1], atol=1e-4)
    none = region_embeddings(clip.visual, maps[-1][0], tiny[:0])
    assert none.shape == (0, DIM)


def test_the_proposer_is_loaded_for_segmenters_alone(folder):
    config = ProposerConfig(fcclip=FcClipConfig(model=folder, short_side=64, long_side=96))
    assert config.name == "fcclip"
    propose = load_proposals(config, ("tree",), device="cpu")
    assert propose(IMAGES[:1])[0].open_classes is not None and propose([]) == []
    with pytest.raises(ValueError, match="fcclip is for segmenters of regions"):
        load_proposer(config, device="cpu")


def test_folders_that_do_not_fit_are_refused(tmp_path):
    folder = write_fcclip(tmp_path / "fcclip")
    with pytest.raises(ModelError, match=r"cannot read .*fcclip\.json.*ovref convert fcclip"):
        loaded(str(tmp_path / "nothing"))

    def changed(**fields):
        path = tmp_path / "changed"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder, path)
        settings = json.loads((path / SETTINGS).read_text())
        (path / SETTINGS).write_text(json.dumps(settings | fields))
        return str(path), settings["decoder"]

    _, decoder = changed()
    for fields, message in (
        ({"format": 7}, "not of format 1"),
        ({"decoder": decoder | {"queries": 0}}, "queries must be at least 1"),
        ({"decoder": decoder | {"queries": 9}}, "cannot load FC-CLIP"),
        ({"decoder": decoder | {"dim": 99}}, "trained with another CLIP"),
        ({"clip": "miniature:clip"}, "no ConvNeXt or ResNet image tower"),
        ({"mood": 1}, "cannot read"),
    ):
        with pytest.raises(ModelError, match=message):
            loaded(changed(**fields)[0])
    with pytest.raises(ValueError, match="short_side"):
        FcClipConfig(model="x", short_side=900, long_side=800)
