"""The mask decoder against FC-CLIP's head, written out slowly from the released names."""

from dataclasses import replace

import pytest
import torch

from fcclip_released import HEADS, SIZES, SlowHead, released_head
from ovref.exchange.checkpoint_names import fcclip_names
from ovref_inference.proposers.mask_decoder import (
    MaskDecoder,
    MaskDecoderConfig,
    class_logits,
    pooled_under,
)

CONFIG = MaskDecoderConfig(heads=HEADS, **SIZES)


def maps_of(count, size_hw=(64, 96), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, width, size_hw[0] // stride, size_hw[1] // stride, generator=generator)
        for width, stride in zip(CONFIG.widths, (4, 8, 16, 32), strict=True)
    ]


@torch.no_grad()
def test_every_layer_is_that_of_the_released_head():
    tensors = released_head()
    decoder = MaskDecoder(CONFIG).eval()
    decoder.load_state_dict(fcclip_names(tensors))
    maps = maps_of(2)
    found = decoder(maps)
    assert len(found) == CONFIG.decoder_layers + 1
    for image in range(2):
        slow = SlowHead(tensors)([one[image] for one in maps])
        for layer, (masks, embeddings) in zip(found, slow, strict=True):
            torch.testing.assert_close(layer.masks_bqhw[image], masks, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(
                layer.embeddings_bqd[image], embeddings, atol=1e-4, rtol=1e-3
            )


@torch.no_grad()
def test_classes_are_cosines_with_texts_and_void():
    decoder = MaskDecoder(CONFIG)
    decoder.log_scale.fill_(9.0)  # of which CLIP takes 100 at most
    embeddings = torch.randn(1, 3, CONFIG.dim)
    texts = torch.nn.functional.normalize(torch.randn(4, CONFIG.dim), dim=1)
    found = class_logits(decoder, embeddings, texts)
    for query in range(3):
        one = embeddings[0, query] / embeddings[0, query].norm()
        void = decoder.void[0] / decoder.void[0].norm()
        expected = [100 * float(one @ known) for known in (*texts, void)]
        torch.testing.assert_close(found[0, query], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_no_gradient_flows_into_the_masks_that_pool():
    masks = torch.randn(1, 2, 8, 8, requires_grad=True)
    features = torch.randn(1, 3, 4, 4, requires_grad=True)
    with torch.no_grad():
        masks[0, 1] = -1.0
    pooled = pooled_under(masks, features)
    assert not pooled[0, 1].any()
    pooled.sum().backward()
    assert masks.grad is None and features.grad is not None


def test_a_start_for_training_is_finite_and_every_weight_learns():
    torch.manual_seed(0)
    decoder = MaskDecoder(CONFIG).train()
    texts = torch.nn.functional.normalize(torch.randn(4, CONFIG.dim), dim=1)
    layers = decoder(maps_of(1))
    loss = sum(
        layer.masks_bqhw.square().mean()
        + class_logits(decoder, layer.embeddings_bqd, texts).square().mean()
        for layer in layers
    )
    assert torch.isfinite(loss)
    loss.backward()
    without = [name for name, one in decoder.named_parameters() if one.grad is None]
    assert without == []


def test_what_does_not_fit_is_refused():
    decoder = MaskDecoder(CONFIG)
    with pytest.raises(ValueError, match=r"expected maps of widths \(8, 16, 24, 32\)"):
        decoder(maps_of(1)[::-1])
    with pytest.raises(ValueError, match="hidden must be a multiple of 32"):
        replace(CONFIG, hidden=40)
    with pytest.raises(ValueError, match="queries must be at least 1"):
        replace(CONFIG, queries=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_decoder_of_full_size_has_the_released_parameters():
    config = MaskDecoderConfig(widths=(192, 384, 768, 1536), dim=768)
    decoder = MaskDecoder(config).eval()
    sizes = {name: len(one.state_dict()) for name, one in decoder.named_children()}
    assert sizes["pixel_decoder"] == 117 and sizes["transformer"] == 209
    maps = [
        torch.randn(1, width, 320 // stride, 320 // stride)
        for width, stride in zip(config.widths, (4, 8, 16, 32), strict=True)
    ]
    found = decoder(maps)[-1]
    assert found.masks_bqhw.shape == (1, 250, 80, 80) and found.embeddings_bqd.shape == (
        1,
        250,
        768,
    )
    assert torch.isfinite(found.embeddings_bqd).all()
