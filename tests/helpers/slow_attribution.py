"""Attribution of diffusion transformers from explicit softmax attention, slowly, in float64."""

import numpy as np
import torch
from torch.nn import functional

from ovref.models.diffusion import Generator, to_uint8
from ovref.models.recorders import recorder_of
from ovref.stages.synthesize import Synthesize

CAPTIONS = ["a cat and a dog", "the zebra, the dog and the dog", "hotdog cat"]
SPANS = [
    [[(2, 5)], [(12, 15)]],
    [[(4, 9)], [(15, 18), (27, 30)], [(19, 22)]],
    [[(7, 10)]],
]
SEEDS = [1, 2, 3]


def settings_of(**fields):
    """A small image; `flow_euler` and 2 steps unless said otherwise."""
    usual = {"scheduler": "flow_euler", "steps": 2, "size_hw": (32, 48), "guidance": 1.0}
    return Synthesize(model="given", **usual | fields)


class ExplicitAttention:
    """Takes the place of `scaled_dot_product_attention` and keeps, for the attention modules of
    chosen blocks, both readings of every call: `maps[block, call]` = (share, output), each a list
    by caption of (nouns, positions) float64."""

    def __init__(self, network, attentions, positions, grid_hw, starts, own):
        """`starts(positions, keys)`: first query of the image and first key of the text; `own`:
        `first` or `last`, the captions' half of a guided batch."""
        self.maps, self.values = {}, {}
        self._positions, self._count = positions, grid_hw[0] * grid_hw[1]
        self._starts, self._own = starts, own
        self._call, self._block = -1, None
        self._fused = functional.scaled_dot_product_attention
        self._hooks = [network.register_forward_pre_hook(self._called)]
        for number, attn in enumerate(attentions):
            self._hooks += [
                attn.register_forward_pre_hook(lambda *_, n=number: setattr(self, "_block", n)),
                attn.register_forward_hook(lambda *_: setattr(self, "_block", None)),
            ]

    def __enter__(self):
        functional.scaled_dot_product_attention = self._attend
        return self

    def __exit__(self, *_):
        functional.scaled_dot_product_attention = self._fused
        for hook in self._hooks:
            hook.remove()

    def _called(self, *_):
        self._call += 1

    def _attend(self, query, key, value, attn_mask=None, **options):
        output = self._fused(query, key, value, attn_mask=attn_mask, **options)
        if self._block is not None:
            scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            elif attn_mask is not None:
                scores = scores + attn_mask
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            outputs = weights @ value.double()
            torch.testing.assert_close(outputs.float(), output.float(), atol=1e-4, rtol=1e-3)
            self.maps[self._block, self._call] = self._readings(weights, outputs)
            self.values.setdefault(self._block, value)
        return output

    def _readings(self, weights, outputs):
        image, text = self._starts(self._count, weights.shape[3])
        first = 0 if self._own == "first" else len(weights) - len(self._positions)
        share, product = [], []
        for b, nouns in enumerate(self._positions):
            of_image = slice(image, image + self._count)
            share.append(torch.stack([
                torch.stack([weights[first + b, :, of_image, text + t].mean(0) for t in noun])
                .mean(0)
                for noun in nouns
            ]))  # fmt: skip
            if outputs.shape[2] != weights.shape[3]:  # cross-attention: tokens have no output
                continue
            rows = outputs[first + b].transpose(0, 1).flatten(1)
            product.append(torch.stack([
                torch.stack([rows[of_image] @ rows[text + t] for t in noun]).mean(0)
                for noun in nouns
            ]))  # fmt: skip
        return share, product


def assert_equals_slow(pipeline, starts, *, read_blocks, calls, own="last", **fields):
    """Generates a mixed batch with and without attribution and compares images and heatmaps.

    Args:
        pipeline: of `load_pipeline`.
        starts, own: as of `ExplicitAttention`.
        read_blocks, calls: which of them the reference averages.
        fields: of the settings.

    Returns:
        The reference, and the heatmaps by caption.
    """
    settings = settings_of(**fields)
    generator, recorder = Generator(pipeline, settings), recorder_of(pipeline)
    positions = [generator.positions(c, s) for c, s in zip(CAPTIONS, SPANS, strict=True)]
    assert all(noun for nouns in positions for noun in nouns)
    generated = generator.generate(CAPTIONS, positions, SEEDS)

    grid_hw = recorder.grid_hw(settings.image_size_hw)
    network = pipeline.transformer
    before = dict(network.named_modules())
    with ExplicitAttention(
        network, recorder.attentions(), positions, grid_hw, starts, own
    ) as reference:
        pixels = pipeline(
            prompt=list(CAPTIONS), num_inference_steps=settings.steps,
            height=settings.image_size_hw[0], width=settings.image_size_hw[1], output_type="pt",
            generator=[torch.Generator().manual_seed(s) for s in SEEDS],
            **recorder.options(CAPTIONS, settings),
        ).images  # fmt: skip
    bare = to_uint8(pixels)[0].numpy()
    assert not any("forward" in vars(module) for module in before.values())
    reading = generator.provenance["reading"]
    for b, one in enumerate(generated):
        np.testing.assert_array_equal(one.image_hwc, bare[b])
        expected = torch.stack([
            reference.maps[block, call][reading == "output"][b]
            for block in read_blocks
            for call in calls
        ]).mean(0)  # fmt: skip
        if reading == "output":
            expected = expected - expected.amin(1, keepdim=True)
        expected = expected.unflatten(1, grid_hw).numpy()
        assert one.heatmaps_nhw.shape == expected.shape and expected.std() > 0
        # Products are rounded in float32; shares are probabilities.
        scale, atol = (float(expected.max()), 1e-5) if reading == "output" else (1.0, 2e-6)
        np.testing.assert_allclose(one.heatmaps_nhw / scale, expected / scale, atol=atol)
    return reference, [one.heatmaps_nhw for one in generated]


def assert_tokens_are_nouns(pipeline, tokenizer, encoder, place=lambda token, ids: token):
    """Decodes, of what the text encoder really sees, the tokens at the nouns' positions.

    Args:
        pipeline: of `load_pipeline`.
        tokenizer: whose tokens the positions count.
        encoder: the text encoder that takes these tokens.
        place: position in the attention's text and (row of ids) -> position in the ids; None for
            a position of another encoder.
    """
    seen = []
    hook = encoder.register_forward_pre_hook(
        lambda module, args, options: seen.append(args[0] if args else options["input_ids"]),
        with_kwargs=True,
    )
    settings = settings_of(steps=1)
    generator = Generator(pipeline, settings)
    try:
        for caption, spans in zip(CAPTIONS, SPANS, strict=True):
            found = generator.positions(caption, spans)
            seen.clear()
            recorder = recorder_of(pipeline)
            pipeline(
                prompt=[caption], num_inference_steps=1, height=32, width=32, output_type="latent",
                generator=[torch.Generator().manual_seed(0)],
                **recorder.options([caption], settings),
            )  # fmt: skip
            ids = seen[0][0].tolist()
            for noun, (positions, mentions) in enumerate(zip(found, spans, strict=True)):
                places = [place(token, ids) for token in positions]
                text = tokenizer.decode([ids[p] for p in places if p is not None])
                expected = "".join(caption[start:end] for start, end in mentions)
                assert text.replace(" ", "") == expected, (caption, noun, text)
    finally:
        hook.remove()
