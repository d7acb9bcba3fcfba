"""MaskFormer and Mask2Former as proposers, on tiny models with random weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    DetrConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    SwinConfig,
)
from transformers import (
    MaskFormerConfig as HfMaskFormerConfig,
)

from ovref_inference import ModelError
from ovref_inference.proposers.config import MaskFormerConfig
from ovref_inference.proposers.mask_former import MaskFormer, exclusive_masks, load_mask_former
from ovref_inference.proposers.proposals import Proposals

SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "drop_path_rate": 0.0,
}
LABELS = {0: "cat", 1: "dog", 2: "sky"}
SIZE = {"shortest_edge": 64, "longest_edge": 96}
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (*hw, 3), dtype=np.uint8) for hw in ((64, 64), (50, 75), (64, 64))]


def maskformer():
    torch.manual_seed(0)
    decoder = DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12,
    )  # fmt: skip
    config = HfMaskFormerConfig(
        backbone_config=SwinConfig(**SWIN),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    return MaskFormerForInstanceSegmentation(config).eval(), MaskFormerImageProcessor(size=SIZE)


def mask2former():
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**SWIN),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=12,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    return Mask2FormerForUniversalSegmentation(config).eval(), Mask2FormerImageProcessor(size=SIZE)


MODELS = {"maskformer": maskformer, "mask2former": mask2former}


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    return MODELS[request.param]()


def config(**changes):
    return MaskFormerConfig(**{"model": "unused", **changes})


def test_proposals_are_the_models_own_masks_and_classes(loaded):
    model, processor = loaded
    proposer = MaskFormer(model, processor, config(min_score=0.0))
    found = next(proposer.propose(IMAGES[:1]))
    with torch.no_grad():
        outputs = model(**processor(images=IMAGES[0], return_tensors="pt"))
    classes = outputs.class_queries_logits[0].softmax(-1)
    order = classes[:, -1].argsort(stable=True)
    # The image needs neither resizing nor padding: one enlargement by 4 is all there is.
    large = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, (64, 64), mode="bilinear"
    )[0].sigmoid()
    np.testing.assert_allclose(found.mask_probs_nhw, large[order].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.class_probs_nc, classes[order].numpy(), atol=1e-6)
    assert found.trained_names == ("cat", "dog", "sky") and len(found.mask_probs_nhw) == 12


def test_queries_that_show_no_object_are_left_out(loaded):
    model, processor = loaded
    everything = list(MaskFormer(model, processor, config(min_score=0.0)).propose(IMAGES))
    objects = np.sort(1 - everything[0].class_probs_nc[:, -1])
    threshold = float(objects[5:7].mean())
    some = list(MaskFormer(model, processor, config(min_score=threshold)).propose(IMAGES))
    assert len(some[0].class_probs_nc) == 6
    np.testing.assert_allclose(some[0].class_probs_nc, everything[0].class_probs_nc[:6], atol=1e-6)
    surely = MaskFormer(model, processor, config(min_score=0.999))
    assert [found.mask_probs_nhw.shape for found in surely.propose(IMAGES)] == [
        (0, 64, 64), (0, 50, 75), (0, 64, 64),
    ]  # fmt: skip


def test_a_batch_of_different_sizes_gives_each_image_its_own_size(loaded):
    model, processor = loaded
    proposer = MaskFormer(model, processor, config(min_score=0.0), batch_size=3)
    together = list(proposer.propose(IMAGES))
    assert [found.mask_probs_nhw.shape[1:] for found in together] == [(64, 64), (50, 75), (64, 64)]
    same = list(proposer.propose([IMAGES[0], IMAGES[2]]))
    for pair, single in zip(same, (IMAGES[0], IMAGES[2]), strict=True):
        alone = next(proposer.propose([single]))
        np.testing.assert_allclose(alone.mask_probs_nhw, pair.mask_probs_nhw, atol=1e-4)
    assert list(proposer.propose([])) == []


class Corner:
    """Says that the first query is the upper left quarter of each image; padded below and right."""

    device = torch.device("cpu")

    def __init__(self):
        self.config = maskformer()[0].config

    def __call__(self, pixel_values, pixel_mask):
        images, _, height, width = pixel_values.shape
        logits = torch.full((images, 1, height // 4, width // 4), -20.0)
        for row, inside_hw in enumerate(pixel_mask):
            rows, columns = int(inside_hw.any(1).sum()), int(inside_hw.any(0).sum())
            logits[row, 0, : rows // 8, : columns // 8] = 20.0
        classes = torch.tensor([[[5.0, 0.0, 0.0, 0.0]]]).expand(images, 1, 4)
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=logits)


def test_padding_is_cut_away_before_masks_are_enlarged():
    images = [np.zeros((*size, 3), np.uint8) for size in ((64, 64), (64, 96), (96, 64), (128, 128))]
    processor = MaskFormerImageProcessor(size=SIZE)
    for found in MaskFormer(Corner(), processor, config()).propose(images):
        mask_hw = found.masks(0.5)[0]
        height, width = mask_hw.shape
        expected = np.zeros_like(mask_hw)
        expected[: height // 2, : width // 2] = True
        assert np.mean(mask_hw != expected) < 0.03


def slow_exclusive(proposals, threshold, min_kept):
    """Pixel by pixel."""
    count, height, width = proposals.mask_probs_nhw.shape
    owner = {}
    for y in range(height):
        for x in range(width):
            weights = [
                proposals.mask_probs_nhw[n, y, x] * (1 - proposals.class_probs_nc[n, -1])
                for n in range(count)
            ]
            owner[y, x] = max(range(count), key=lambda n: (weights[n], -n))
    for number in range(count):
        own = [(y, x) for (y, x) in owner if proposals.mask_probs_nhw[number, y, x] >= threshold]
        kept = [place for place in own if owner[place] == number]
        if kept and len(kept) > min_kept * len(own):
            yield number, set(kept)


@pytest.mark.parametrize("threshold", [0.4, 0.5])
@pytest.mark.parametrize("min_kept", [0.0, 0.3, 0.8])
def test_exclusive_masks_are_those_of_the_obvious_loop(threshold, min_kept):
    rng = np.random.default_rng(1)
    for count in (1, 2, 5):
        classes = rng.dirichlet(np.ones(3), count).astype(np.float32)
        soft = rng.random((count, 1, 1)) * rng.random((count, 6, 7)) ** 0.3
        proposals = Proposals(
            mask_probs_nhw=soft.astype(np.float32),
            class_probs_nc=classes,
            trained_names=("a", "b"),
        )
        settings = config(mask_threshold=threshold, min_kept=min_kept)
        masks, rows = exclusive_masks(proposals, settings)
        expected = dict(slow_exclusive(proposals, threshold, min_kept))
        assert rows.tolist() == sorted(expected)
        for mask, row in zip(masks, rows, strict=True):
            assert {tuple(map(int, place)) for place in np.argwhere(mask)} == expected[row]
        assert masks.sum(0).max(initial=0) <= 1


def test_no_proposals_make_no_masks():
    none = Proposals(
        mask_probs_nhw=np.zeros((0, 4, 5), np.float32),
        class_probs_nc=np.zeros((0, 3), np.float32),
        trained_names=("a", "b"),
    )
    masks, rows = exclusive_masks(none, config())
    assert masks.shape == (0, 4, 5) and rows.shape == (0,)


def test_a_saved_folder_loads(loaded, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = config(model=str(tmp_path), min_score=0.0)
    ours = list(load_mask_former(settings, device="cpu").propose(IMAGES[:2]))
    direct = list(MaskFormer(model, processor, settings).propose(IMAGES[:2]))
    for found, expected in zip(ours, direct, strict=True):
        np.testing.assert_allclose(found.mask_probs_nhw, expected.mask_probs_nhw, atol=1e-4)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ModelError, match="cannot load MaskFormer"):
        load_mask_former(config(model=str(tmp_path)))
    SwinConfig(**SWIN).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it is a swin"):
        load_mask_former(config(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["min_score", "min_kept", "mask_threshold"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name):
        config(**{name: 1.0})


def test_a_model_and_an_image_processor_that_do_not_fit_are_refused_at_loading(tmp_path):
    model, _ = maskformer()
    model.save_pretrained(tmp_path)
    MaskFormerImageProcessor(size=SIZE, image_mean=[0.5] * 2, image_std=[0.5] * 2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="cannot use MaskFormer"):
        load_mask_former(config(model=str(tmp_path)), device="cpu")
