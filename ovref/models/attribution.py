"""Attribution heatmaps: where a noun's tokens were attended to while an image was drawn (DAAM).

DAAM (Tang et al., "What the DAAM", ACL 2023, section 3) reads the cross-attention of a diffusion
UNet: for a word, the mean over layers, heads and steps of the attention that each image position
pays to the word's tokens, every layer's map first upsampled to the size of the latent. Here that
mean is accumulated while the pipeline draws a batch of different captions, in one float32 buffer
per resolution:

    buffer[image, noun, position] += sum over heads of weights @ softmax(k q^T / sqrt(d))

where `weights` (image, noun, key) is 1 / (number of the noun's tokens) at the noun's tokens and 0
elsewhere. Summing, averaging and upsampling are linear, so upsampling each buffer once equals
upsampling every map. Three deviations from the published program:

- negative values that bicubic upsampling makes are clamped once at the end, not once per map, so
  that memory does not grow with layers and heads. Beside sharp peaks DAAM's own order comes out a
  little higher: `tests/benchmarks/results/attribution.md` has the measured difference;
- the mean is also taken over the steps, so a heatmap is in units of attention probability;
- the conditional part of a guided batch is known from the number of captions, never guessed, so
  unguided sampling (LCM, distilled models) keeps all its heads.

The output of the attention stays the fused `scaled_dot_product_attention` on the same inputs:
images are bit for bit the ones drawn without attribution. The softmax is never written out:

- on a CPU the fused kernel also gives the logarithm of each softmax's denominator, so that
  exp(q k - log denominator) is needed for the few tokens of nouns only;
- elsewhere a second fused product has `weights` for its values: its output is the nouns' share.

Neither has a loop over tokens or heads, reads a number back from the device, or changes anything
but tensors made beforehand, so a UNet that records can be compiled as one graph. What each way
costs, and others that were tried: `tests/benchmarks/results/attribution.md`.
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


PAD = 8
"""Nouns and their tokens are counted in multiples of this."""


def noun_weights(positions: Sequence[Sequence[Sequence[int]]], keys: int) -> torch.Tensor:
    """The matrix that averages the attention columns of each noun's tokens.

    Args:
        positions: per caption, per noun, the positions of its tokens (`token_positions`).
        keys: length of the text encoder's context.

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
    return weights_bkn


class Attribution:
    """What has been attended to so far; made by `recording`, read with `heatmaps_bnhw`."""

    def __init__(
        self,
        weights_bkn: torch.Tensor,
        latent_hw: tuple[int, int],
        factors: Sequence[int] = FACTORS,
        device: Any = "cpu",
    ):
        captions, self._keys, self._nouns = weights_bkn.shape
        self._captions = captions
        self._latent_hw = latent_hw
        self._factors = tuple(factors)
        tokens_bt = _used_positions(weights_bkn)
        # Padded, so that batches of other captions have tensors of the same shapes.
        weights_bkn = functional.pad(weights_bkn, (0, -self._nouns % PAD))
        weights_btn = weights_bkn.gather(
            1, tokens_bt[:, :, None].expand(-1, -1, weights_bkn.shape[2])
        )
        self._tokens_bt = tokens_bt.to(device)
        self._weights_bnt = weights_btn.transpose(1, 2).contiguous().to(device)
        self._weights_bkn = weights_bkn.to(device)
        height, width = latent_hw
        # A UNet halves with stride 2 and padding 1, so an odd size is rounded up.
        self._sizes_hw = [(math.ceil(height / f), math.ceil(width / f)) for f in factors]
        self._sums_bnp = {
            h * w: torch.zeros(captions, weights_bkn.shape[2], h * w, device=device)
            for h, w in self._sizes_hw
        }
        self._maps = torch.zeros((), dtype=torch.int64, device=device)

    def attend(
        self, query_bhpd: torch.Tensor, key_bhkd: torch.Tensor, value_bhkd: torch.Tensor
    ) -> torch.Tensor:
        """Attends, and adds one layer's attention at one step.

        Args:
            query_bhpd: (rows, heads, positions, d), rows being the captions, or under guidance
                first the unconditional and then the conditional ones.
            key_bhkd: (rows, heads, keys, d).
            value_bhkd: (rows, heads, keys, d).

        Returns:
            What `scaled_dot_product_attention` of the three is, (rows, heads, positions, d).

        Raises:
            ModelError: rows or keys do not belong to the captions being recorded.
        """
        sums_bnp = self._sums_bnp.get(query_bhpd.shape[2])
        if sums_bnp is None:
            return functional.scaled_dot_product_attention(query_bhpd, key_bhkd, value_bhkd)
        rows, heads, _, _ = query_bhpd.shape
        if rows not in (self._captions, 2 * self._captions) or key_bhkd.shape[2] != self._keys:
            raise ModelError(
                f"cross-attention of {rows} rows over {key_bhkd.shape[2]} keys while recording "
                f"{self._captions} captions over {self._keys}: expected one row per caption, two "
                "under guidance"
            )
        self._maps += heads
        first = rows - self._captions
        if query_bhpd.device.type == "cpu":
            # The kernel that scaled_dot_product_attention takes on a CPU, with its second result.
            output, log_sums_bhp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query_bhpd, key_bhkd, value_bhkd
            )
            self._add_tokens(sums_bnp, query_bhpd[first:], key_bhkd[first:], log_sums_bhp[first:])
            return output
        self._add_second_product(sums_bnp, query_bhpd[first:], key_bhkd[first:])
        return functional.scaled_dot_product_attention(query_bhpd, key_bhkd, value_bhkd)

    def _add_tokens(
        self,
        sums_bnp: torch.Tensor,
        query_bhpd: torch.Tensor,
        key_bhkd: torch.Tensor,
        log_sums_bhp: torch.Tensor,
    ) -> None:
        """Adds exp(q k / sqrt(d) - log of the softmax's denominator), at the nouns' tokens."""
        _, heads, positions, depth = query_bhpd.shape
        key_bhtd = key_bhkd.gather(
            2, self._tokens_bt[:, None, :, None].expand(-1, heads, -1, depth)
        )
        # Tokens before positions: heads and tokens then become one axis without a copy, over which
        # one product averages and adds up.
        scores_btp = torch.baddbmm(
            log_sums_bhp.flatten(0, 1)[:, None].float(),
            key_bhtd.flatten(0, 1).float(),
            query_bhpd.flatten(0, 1).float().mT,
            beta=-1,
            alpha=depth**-0.5,
        )
        shares = scores_btp.exp_().view(self._captions, -1, positions)
        sums_bnp.baddbmm_(self._weights_bnt.repeat(1, 1, heads), shares)

    def _add_second_product(
        self, sums_bnp: torch.Tensor, query_bhpd: torch.Tensor, key_bhkd: torch.Tensor
    ) -> None:
        """Adds the fused attention whose values are the nouns' weights."""
        _, heads, _, depth = query_bhpd.shape
        nouns = self._weights_bkn.shape[2]
        # Fused kernels want values as wide as queries.
        values_bkd = functional.pad(self._weights_bkn, (0, max(0, depth - nouns)))
        values_bhkd = values_bkd.to(query_bhpd.dtype)[:, None].expand(-1, heads, -1, -1)
        shares_bhpn = functional.scaled_dot_product_attention(query_bhpd, key_bhkd, values_bhkd)
        sums_bnp += shares_bhpn[..., :nouns].sum(1, dtype=torch.float32).mT

    def heatmaps_bnhw(self) -> torch.Tensor:
        """The heatmaps, (captions, nouns, h, w) float32 >= 0 at the size of the latent.

        A value is the mean probability, over layers, heads and steps, with which the position
        attends to a token of the noun. All zero where `noun_weights` has a zero column.

        Raises:
            ModelError: nothing was recorded.
        """
        maps = int(self._maps)
        if maps == 0:
            raise ModelError(
                f"no cross-attention was recorded at {sorted(self._sizes_hw)}: the UNet has none "
                f"at factors {self._factors} of the latent {self._latent_hw} or did not run"
            )
        total = self._weights_bkn.new_zeros(self._captions, self._nouns, *self._latent_hw)
        for height, width in self._sizes_hw:
            sums_bnp = self._sums_bnp[height * width][:, : self._nouns]
            if self._nouns:  # interpolate refuses an empty channel axis
                sums_bnhw = sums_bnp.unflatten(2, (height, width))
                total += functional.interpolate(sums_bnhw, self._latent_hw, mode="bicubic")
        return (total / maps).clamp_(min=0)


def _used_positions(weights_bkn: torch.Tensor) -> torch.Tensor:
    """Keys of any weight, (captions, most that one caption has) int64; filled with other keys."""
    used_bk = weights_bkn.any(2)
    most = int(used_bk.sum(1).max()) if len(used_bk) else 0
    wanted = min(max(PAD, most + -most % PAD), used_bk.shape[1])
    return (~used_bk).to(torch.int8).argsort(dim=1, stable=True)[:, :wanted]


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
        weights_bkn: of the captions in the batch (`noun_weights`).
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
    attribution = Attribution(weights_bkn, latent_hw, factors, unet.device)
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
        output = self._attribution.attend(query, key, value).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](output))
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor
