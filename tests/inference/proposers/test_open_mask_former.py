"""A MaskFormer whose queries give embeddings: its own answers, and what it passes to segmenters."""

import numpy as np
import pytest
import torch
from transformers import DetrConfig, MaskFormerImageProcessor, MaskFormerSwinConfig
from transformers import MaskFormerConfig as HfMaskFormerConfig

from ovref_inference.errors import ModelError
from ovref_inference.proposers.config import MaskFormerConfig, ProposerConfig
from ovref_inference.proposers.load import load_proposals, load_proposer
from ovref_inference.proposers.mask_former import load_mask_former
from ovref_inference.proposers.open_mask_former import OpenMaskFormer

DIM = 6
LABELS = ("cat", "dog", "sky")
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def saved(folder, texts=0, **open_classes):
    """A small model with random weights, in transformers' layout."""
    torch.manual_seed(0)
    config = HfMaskFormerConfig(
        backbone_config=MaskFormerSwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
            window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
            drop_path_rate=0.0,
        ),
        decoder_config=DetrConfig(
            d_model=16, decoder_layers=2, decoder_ffn_dim=16, decoder_attention_heads=2,
            num_queries=12, dropout=0.0,
        ),
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=dict(enumerate(LABELS)),
        label2id={name: number for number, name in enumerate(LABELS)},
    )  # fmt: skip
    config.open_classes = {
        "widths": [16, 10, DIM], "scale": 20.0, "templates": ["a {}."], "texts": texts
    } | open_classes  # fmt: skip
    model = OpenMaskFormer(config).eval()
    if texts:
        model.trained_texts.copy_(torch.nn.functional.normalize(torch.randn(texts, DIM), dim=1))
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    MaskFormerImageProcessor(size=size).save_pretrained(folder)
    return model, str(folder)


def answers(model, folder):
    """What the model itself says of the image."""
    processor = MaskFormerImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=IMAGE, return_tensors="pt"))
    large = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, (64, 64), mode="bilinear"
    )[0]
    return large.sigmoid().numpy(), outputs.masks_queries_logits[0], outputs.class_queries_logits[0]


def test_every_query_with_a_mask_says_of_any_class_what_it_shows(tmp_path):
    model, folder = saved(tmp_path)
    config = MaskFormerConfig(model=folder)
    found = next(load_mask_former(config, device="cpu").propose([IMAGE]))
    masks, logits, embeddings = answers(model, folder)
    shown = [q for q in range(12) if (logits[q] > 0).any()]
    np.testing.assert_allclose(found.mask_probs_nhw, masks[shown], atol=1e-5)
    assert found.class_probs_nc is None and found.trained_names == LABELS
    said = found.open_classes
    assert (said.scale, said.templates) == (20.0, ("a {}.",))
    for row, query in enumerate(shown):
        one = embeddings[query].numpy()
        np.testing.assert_allclose(said.embeddings_nd[row], one / np.linalg.norm(one), atol=1e-5)
    np.testing.assert_allclose(
        said.void_d * float(model.void.detach().norm()), model.void.detach()[0], atol=1e-5
    )
    for changes in ({}, {"min_score": 0.0}, {"exclusive": False}):
        with pytest.raises(ModelError, match="no texts of its trained ones"):
            chosen = MaskFormerConfig(model=folder, **changes)
            load_proposer(ProposerConfig(mask_former=chosen), device="cpu")
    every = MaskFormerConfig(model=folder, min_score=0.0, exclusive=False)
    (masks_nhw,) = load_proposer(ProposerConfig(mask_former=every), device="cpu")([IMAGE])
    np.testing.assert_array_equal(masks_nhw, masks[shown] >= 0.4)


def test_with_the_texts_of_its_trained_classes_it_is_a_proposer_like_any_other(tmp_path):
    model, folder = saved(tmp_path, texts=3)
    config = MaskFormerConfig(model=folder, min_score=0.0)
    (found,) = load_proposals(ProposerConfig(mask_former=config), (), device="cpu")([IMAGE])
    masks, _, embeddings = answers(model, folder)
    probabilities = []
    for one in embeddings.numpy():
        one = one / np.linalg.norm(one)
        void = model.void.detach()[0].numpy()
        known = [*model.trained_texts.numpy(), void / np.linalg.norm(void)]
        powers = np.exp([20 * float(one @ text) for text in known])
        probabilities.append(powers / powers.sum())
    order = np.argsort([one[-1] for one in probabilities], kind="stable")
    np.testing.assert_allclose(found.class_probs_nc, np.array(probabilities)[order], atol=1e-5)
    np.testing.assert_allclose(found.mask_probs_nhw, masks[order], atol=1e-5)
    assert len(found.open_classes.embeddings_nd) == 12
    masks_nhw = load_proposer(ProposerConfig(mask_former=config), device="cpu")([IMAGE])[0]
    assert masks_nhw.dtype == bool and (masks_nhw.sum(0) <= 1).all()


def test_a_model_of_other_sizes_is_refused(tmp_path):
    model, folder = saved(tmp_path)
    model.config.open_classes["widths"] = [16, 12, DIM]
    model.config.save_pretrained(folder)
    with pytest.raises(ModelError, match="load MaskFormer"):
        load_mask_former(MaskFormerConfig(model=folder), device="cpu")
