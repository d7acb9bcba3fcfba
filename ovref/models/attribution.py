"""Attribution heatmaps: where a noun's tokens were attended to while an image was drawn (DAAM).

DAAM (Tang et al., "What the DAAM", ACL 2023, section 3) reads the cross-attention of a diffusion
UNet: for a word, the mean over layers, heads and steps of the attention that each image position
pays to the word's tokens, every layer's map first upsampled to the size of the latent. Here that
mean is accumulated while the pipeline draws a batch of different captions, in one float32 buffer
per resolution:

    buffer[image, noun, position] += sum over heads of weights @ softmax(k q^T / sqrt(d))

where `weights` (image, noun, key) is 1 / (number of the noun's tokens) at the noun's tokens and 0
elsewhere, so one product picks, averages and accumulates. Summing, averaging and upsampling are
linear, so upsampling each buffer once equals upsampling every map. Three deviations from the
published program:

- negative values that bicubic upsampling makes are clamped once at the end, not once per map, so
  that memory does not grow with layers and heads. Beside sharp peaks DAAM's own order comes out a
  little higher: `tests/benchmarks/results/attribution.md` has the measured difference;
- the mean is also taken over the steps, so a heatmap is in units of attention probability;
- the conditional part of a guided batch is known from the number of captions, never guessed, so
  unguided sampling (LCM, distilled models) keeps all its heads.

The output of the attention stays the fused `scaled_dot_product_attention` on the same inputs:
images are bit for bit the ones drawn without attribution.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn import functional

from ovref.errors import ModelError

FACTORS = (1, 2, 4)
"""Down-sampling factors, relative to the latent, of the layers that count by default. As in DAAM,
the maps at a factor of 8 and the middle block are left out: too coarse to place anything."""


def noun_weights(
    positions: Sequence[Sequence[Sequence[int]]], keys: int, device: Any = "cpu"
) -> torch.Tensor:
    """The matrix that averages the attention columns of each noun's tokens.

    Args:
        positions: per caption, per noun, the positions of its tokens (`token_positions`).
        keys: length of the text encoder's context.
        device: of the result.

    Returns:
        (captions, keys, nouns) float32, with nouns the most that one caption has. A column is zero
        where a caption has fewer nouns or a noun has no position.

    Raises:
        ValueError: a position is not in [0, keys).
    """
    nouns = max((len(caption) for caption in positions), default=0)
    weights_bkn = torch.zeros(len(positions), keys, nouns)
    for b, caption in enumerate(positions):
        for n, noun in enumerate(caption):
            for position in noun:
                if not 0 <= position < keys:
                    raise ValueError(f"token position {position} is not in [0, {keys})")
                weights_bkn[b, position, n] = 1 / len(noun)
    return weights_bkn.to(device)


class Attribution:
    """What has been attended to so far; made by `recording`, read with `heatmaps_bnhw`."""

    def __init__(
        self,
        weights_bkn: torch.Tensor,
        latent_hw: tuple[int, int],
        factors: Sequence[int] = FACTORS,
    ):
        self._weights_bkn = weights_bkn
        self._latent_hw = latent_hw
        self._factors = tuple(factors)
        height, width = latent_hw
        # A UNet halves with stride 2 and padding 1, so an odd size is rounded up.
        sizes = [(math.ceil(height / f), math.ceil(width / f)) for f in factors]
        self._size_of_length = {h * w: (h, w) for h, w in sizes}
        self._sums_bnp: dict[tuple[int, int], torch.Tensor] = {}
        self._maps = 0

    def add(self, query_bhpd: torch.Tensor, key_bhkd: torch.Tensor) -> None:
        """Adds one layer's attention at one step.

        Args:
            query_bhpd: (rows, heads, positions, d), rows being the captions, or under guidance
                first the unconditional and then the conditional ones.
            key_bhkd: (rows, heads, keys, d).

        Raises:
            ModelError: rows or keys do not belong to the captions being recorded.
        """
        size_hw = self._size_of_length.get(query_bhpd.shape[2])
        if size_hw is None:
            return
        captions, keys, nouns = self._weights_bkn.shape
        rows, heads, positions, depth = query_bhpd.shape
        if rows not in (captions, 2 * captions) or key_bhkd.shape[2] != keys:
            raise ModelError(
                f"cross-attention of {rows} rows over {key_bhkd.shape[2]} keys while recording "
                f"{captions} captions over {keys}: expected one row per caption, two under guidance"
            )
        query = query_bhpd[rows - captions :].float()
        key = key_bhkd[rows - captions :].float() * depth**-0.5
        # Keys before positions: the softmax then runs along whole rows of memory, and heads and
        # keys become one axis without a copy, over which one product picks, averages and adds up.
        attention_bhkp = torch.softmax(key @ query.transpose(-1, -2), dim=-2)

        sums_bnp = self._sums_bnp.get(size_hw)
        if sums_bnp is None:
            sums_bnp = query.new_zeros(captions, nouns, positions)
            self._sums_bnp[size_hw] = sums_bnp
        weights_bn_hk = self._weights_bkn.transpose(1, 2).repeat(1, 1, heads)
        sums_bnp.baddbmm_(weights_bn_hk, attention_bhkp.flatten(1, 2))
        self._maps += heads

    def heatmaps_bnhw(self) -> torch.Tensor:
        """The heatmaps, (captions, nouns, h, w) float32 >= 0 at the size of the latent.

        A value is the mean probability, over layers, heads and steps, with which the position
        attends to a token of the noun. All zero where `noun_weights` has a zero column.

        Raises:
            ModelError: nothing was recorded.
        """
        if self._maps == 0:
            raise ModelError(
                f"no cross-attention was recorded at {sorted(self._size_of_length.values())}: the "
                f"UNet has none at factors {self._factors} of the latent {self._latent_hw} or did "
                "not run"
            )
        captions, _, nouns = self._weights_bkn.shape
        total = self._weights_bkn.new_zeros(captions, nouns, *self._latent_hw)
        for size_hw, sums_bnp in self._sums_bnp.items():
            maps = sums_bnp.view(captions, nouns, *size_hw)
            if nouns:  # interpolate refuses an empty channel axis
                total += functional.interpolate(maps, self._latent_hw, mode="bicubic")
        return (total / self._maps).clamp_(min=0)


@contextmanager
def recording(
    unet: Any,
    weights_bkn: torch.Tensor,
    latent_hw: tuple[int, int],
    factors: Sequence[int] = FACTORS,
) -> Iterator[Attribution]:
    """Records the cross-attention of a `UNet2DConditionModel` while it runs inside the block.

    Only the processors of cross-attention outside the middle block are exchanged, and all are put
    back at the end, whatever happens.

    Args:
        unet: the UNet of a Stable Diffusion 1.x, 2.x or XL pipeline.
        weights_bkn: of the captions in the batch (`noun_weights`), on the UNet's device.
        latent_hw: height and width of the latents drawn.
        factors: down-sampling factors, relative to the latent, of the layers that count.

    Raises:
        ModelError: a cross-attention layer works in a way whose attention cannot be read.
    """
    layers = {
        name: unet.get_submodule(name.removesuffix(".processor"))
        for name in unet.attn_processors
        if is_recorded(name)
    }
    if not layers:
        raise ModelError(f"{type(unet).__name__} has no attn2.processor outside its middle block")
    for name, attn in layers.items():
        _check_readable(name, attn)
    before = {name: attn.processor for name, attn in layers.items()}
    attribution = Attribution(weights_bkn, latent_hw, factors)
    try:
        for attn in layers.values():
            attn.set_processor(_RecordingProcessor(attribution))
        yield attribution
    finally:
        for name, attn in layers.items():
            attn.set_processor(before[name])


def is_recorded(processor_name: str) -> bool:
    """Whether the layer of this `unet.attn_processors` key counts: cross-attention, not middle."""
    return processor_name.endswith("attn2.processor") and not processor_name.startswith("mid_block")


def _check_readable(name: str, attn: Any) -> None:
    if type(attn.processor) is not AttnProcessor2_0:
        raise ModelError(
            f"{name} is {type(attn.processor).__name__}, expected AttnProcessor2_0: call "
            "unet.set_default_attn_processor() and do not fuse projections or add adapters"
        )
    unusual = {
        "spatial_norm": attn.spatial_norm is not None,
        "group_norm": attn.group_norm is not None,
        "norm_cross": bool(attn.norm_cross),
        "norm_q or norm_k": attn.norm_q is not None or attn.norm_k is not None,
        "residual_connection": attn.residual_connection,
    }
    if any(unusual.values()):
        found = ", ".join(option for option, present in unusual.items() if present)
        raise ModelError(f"{name} cannot be recorded: its attention uses {found}")


class _RecordingProcessor:
    """The plain attention of a transformer block, whose query and key are seen on the way."""

    def __init__(self, attribution: Attribution):
        self._attribution = attribution

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise ModelError("attribution does not know masked cross-attention")

        def split(states: torch.Tensor) -> torch.Tensor:
            rows, length, channels = states.shape
            return states.view(rows, length, attn.heads, channels // attn.heads).transpose(1, 2)

        query = split(attn.to_q(hidden_states))
        key = split(attn.to_k(encoder_hidden_states))
        value = split(attn.to_v(encoder_hidden_states))
        self._attribution.add(query, key)
        output = functional.scaled_dot_product_attention(query, key, value)
        output = output.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor
