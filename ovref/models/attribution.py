"""Attribution heatmaps: where an image attends to a noun's tokens while it is generated (DAAM).

DAAM (Tang et al., "What the DAAM", ACL 2023, section 3) reads the cross-attention of a diffusion
UNet: for a word, the mean over layers, heads and steps of the attention that each image position
pays to the word's tokens, every layer's map first upsampled to the size of the latent. Here that
mean is accumulated while the pipeline generates a batch of different captions, in one float32
buffer per resolution:

    buffer[image, noun, position] += sum over heads of weights @ softmax(k q^T / sqrt(d))

where `weights` (image, noun, key) is 1 / (number of the noun's tokens) at the noun's tokens and 0
elsewhere. Summing, averaging and upsampling are linear, so upsampling each buffer once equals
upsampling every map. Three deviations from the published program:

- negative values from bicubic upsampling are clamped once at the end, not once per map, so that
  memory does not grow with layers and heads. Next to sharp peaks, DAAM's order gives slightly
  higher values; the mean IoU with the masks of daam's own code is 0.97 (minimum 0.93), and 0.98
  (0.95) on the miniature;
- the mean is also taken over the steps, so heatmaps are attention probabilities;
- the conditional half of a guided batch follows from the number of captions, so unguided sampling
  (LCM, distilled models) keeps all its heads.

The output of the attention stays the fused `scaled_dot_product_attention` on the same inputs:
images are bit-identical to those generated without attribution. The softmax is never materialised:

- on a CPU the fused kernel also returns the logarithm of each softmax's denominator, so that
  exp(q k - log denominator) is computed only for the few tokens of nouns;
- elsewhere a second fused attention takes `weights` as its values; its output is the nouns' share.

Neither loops over tokens or heads, synchronises with the device, or changes anything but
preallocated tensors, so a recording UNet compiles to one graph. Costs, and alternatives that were
tried: `tests/benchmarks/results/attribution.md`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ovref.errors import ModelError

FACTORS = (1, 2, 4)
"""Down-sampling factors, relative to the latent, of the layers recorded by default. As in DAAM,
the maps at a factor of 8 and in the middle block are left out, being too coarse."""


PAD = 8
"""Numbers of nouns and of their tokens are rounded up to multiples of this, so that tensor shapes
stay the same from batch to batch."""


def noun_weights(positions: Sequence[Sequence[Sequence[int]]], keys: int) -> torch.Tensor:
    """The matrix that averages the attention columns of each noun's tokens.

    Args:
        positions: per caption, per noun, the positions of its tokens (`token_positions`).
        keys: length of the text encoder's context.

    Returns:
        (captions, keys, nouns) float32, where `nouns` is the maximum over captions. A column is
        zero where a caption has fewer nouns or a noun has no position.

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


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A cross-attention layer that is recorded."""

    factor: int
    """Down-sampling factor of its grid, relative to the latent, in each direction."""
    heads: int
    depth: int
    """Channels of a head."""


class Attribution:
    """Accumulated cross-attention; created by `recording`, read with `heatmaps_bnhw`."""

    def __init__(
        self,
        weights_bkn: torch.Tensor,
        latent_hw: tuple[int, int],
        layers: Sequence[Layer],
        *,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ):
        captions, self._keys, self._nouns = weights_bkn.shape
        self._captions = captions
        self._latent_hw = latent_hw
        self._heads = sum(layer.heads for layer in layers)
        tokens_bt = _used_positions(weights_bkn)
        weights_bkn = functional.pad(weights_bkn, (0, -self._nouns % PAD))
        weights_btn = weights_bkn.gather(
            1, tokens_bt[:, :, None].expand(-1, -1, weights_bkn.shape[2])
        )
        height, width = latent_hw
        # A UNet halves with stride 2 and padding 1, so an odd size is rounded up.
        self._sizes_hw = {
            layer.factor: (math.ceil(height / layer.factor), math.ceil(width / layer.factor))
            for layer in layers
        }
        self._sums_bnp = {
            factor: torch.zeros(captions, weights_bkn.shape[2], h * w, device=device)
            for factor, (h, w) in self._sizes_hw.items()
        }
        # Everything that a layer needs is made once here, not at each step.
        rows = {
            heads: _rows(tokens_bt, self._keys, heads).to(device)
            for heads in {layer.heads for layer in layers}
        }
        weights = {
            heads: weights_btn.mT.repeat(1, 1, heads).to(device)
            for heads in {layer.heads for layer in layers}
        }
        values = {
            # Fused kernels need values as wide as queries. Repeated, not expanded: not every GPU
            # kernel supports a stride of 0, and the tensors are small.
            (heads, depth): functional.pad(weights_bkn, (0, max(0, depth - weights_bkn.shape[2])))
            .to(device, dtype)[:, None]
            .repeat(1, heads, 1, 1)
            for heads, depth in {(layer.heads, layer.depth) for layer in layers}
        }
        self._layers = [
            _Prepared(
                sums_bnp=self._sums_bnp[layer.factor],
                rows=rows[layer.heads],
                weights_bnt=weights[layer.heads],
                values_bhkd=values[layer.heads, layer.depth],
            )
            for layer in layers
        ]
        self._calls = torch.zeros((), dtype=torch.int64, device=device)

    def attend(
        self,
        layer: int,
        query_bhpd: torch.Tensor,
        key_bhkd: torch.Tensor,
        value_bhkd: torch.Tensor,
    ) -> torch.Tensor:
        """Attends, and adds one layer's attention at one step.

        Args:
            layer: its number among `layers`; the first one also counts the calls of the UNet.
            query_bhpd: (rows, heads, positions, d), rows being the captions, or under guidance
                first the unconditional and then the conditional ones.
            key_bhkd: (rows, heads, keys, d).
            value_bhkd: (rows, heads, keys, d).

        Returns:
            `scaled_dot_product_attention` of the three, (rows, heads, positions, d).

        Raises:
            ModelError: rows, positions or keys do not belong to the captions being recorded.
        """
        prepared = self._layers[layer]
        rows, keys = key_bhkd.shape[0], key_bhkd.shape[2]
        if rows not in (self._captions, 2 * self._captions) or keys != self._keys:
            raise ModelError(
                f"cross-attention of {rows} rows over {keys} keys while recording "
                f"{self._captions} captions over {self._keys}: expected one row per caption, two "
                "under guidance"
            )
        if query_bhpd.shape[2] != prepared.sums_bnp.shape[2]:
            raise ModelError(
                f"cross-attention of {query_bhpd.shape[2]} positions while recording latents of "
                f"{self._latent_hw}: expected {prepared.sums_bnp.shape[2]} in this layer"
            )
        if layer == 0:
            self._calls += 1
        if query_bhpd.device.type == "cpu":
            # The kernel behind scaled_dot_product_attention on a CPU, with its second result.
            output, log_sums_bhp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query_bhpd, key_bhkd, value_bhkd
            )
            if rows != self._captions:
                query_bhpd, key_bhkd, log_sums_bhp = (
                    tensor[self._captions :] for tensor in (query_bhpd, key_bhkd, log_sums_bhp)
                )
            _add_tokens(prepared, query_bhpd, key_bhkd, log_sums_bhp)
            return output
        first = rows - self._captions
        _add_second_product(prepared, query_bhpd[first:], key_bhkd[first:])
        return functional.scaled_dot_product_attention(query_bhpd, key_bhkd, value_bhkd)

    def heatmaps_bnhw(self) -> torch.Tensor:
        """The heatmaps, (captions, nouns, h, w) float32 >= 0 at the size of the latent.

        A value is the mean probability, over layers, heads and steps, with which the position
        attends to a token of the noun. All zero where `noun_weights` has a zero column.

        Raises:
            ModelError: nothing was recorded.
        """
        maps = int(self._calls) * self._heads
        if maps == 0:
            raise ModelError("no cross-attention was recorded: the UNet did not run")
        total = self._layers[0].sums_bnp.new_zeros(self._captions, self._nouns, *self._latent_hw)
        for factor, size_hw in self._sizes_hw.items():
            sums_bnp = self._sums_bnp[factor][:, : self._nouns]
            if self._nouns:  # interpolate refuses an empty channel axis
                sums_bnhw = sums_bnp.unflatten(2, size_hw)
                total += functional.interpolate(sums_bnhw, self._latent_hw, mode="bicubic")
        return (total / maps).clamp_(min=0)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Constants and accumulators of a layer, shared between layers of equal shape."""

    sums_bnp: torch.Tensor
    """(captions, nouns, positions) float32."""
    rows: torch.Tensor
    """`_rows` of the nouns' tokens."""
    weights_bnt: torch.Tensor
    """(captions, nouns, heads * tokens) float32."""
    values_bhkd: torch.Tensor
    """(captions, heads, keys, d or more): the nouns' weights, padded."""


def _add_tokens(
    prepared: _Prepared,
    query_bhpd: torch.Tensor,
    key_bhkd: torch.Tensor,
    log_sums_bhp: torch.Tensor,
) -> None:
    """Adds exp(q k / sqrt(d) - log of the softmax's denominator), at the nouns' tokens."""
    captions, heads, positions, depth = query_bhpd.shape
    keys = key_bhkd.transpose(1, 2).reshape(-1, depth)  # a view: projections are laid out like this
    key_xtd = keys.index_select(0, prepared.rows).view(captions * heads, -1, depth)
    # With tokens before positions, heads and tokens become one axis without a copy, and a single
    # product averages over it.
    shares_btp = shares_of_tokens(query_bhpd, key_xtd, log_sums_bhp).view(captions, -1, positions)
    prepared.sums_bnp.baddbmm_(prepared.weights_bnt, shares_btp)


def shares_of_tokens(
    query_bhpd: torch.Tensor,
    key_xtd: torch.Tensor,
    log_sums_bhp: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """exp(scale * q k - log of the softmax's denominator), (b * h, tokens, positions) float32.

    Args:
        key_xtd: keys of the tokens alone, x counting b * h.
        scale: None for 1 / sqrt(d).
    """
    scores_xtp = torch.baddbmm(
        log_sums_bhp.flatten(0, 1)[:, None].float(),
        key_xtd.float(),
        query_bhpd.flatten(0, 1).float().mT,
        beta=-1,
        alpha=query_bhpd.shape[3] ** -0.5 if scale is None else scale,
    )
    return scores_xtp.exp_()


def _add_second_product(
    prepared: _Prepared, query_bhpd: torch.Tensor, key_bhkd: torch.Tensor
) -> None:
    """Adds the fused attention whose values are the nouns' weights."""
    sums_bnp = prepared.sums_bnp
    shares_bhpn = functional.scaled_dot_product_attention(
        query_bhpd, key_bhkd, prepared.values_bhkd
    )
    sums_bnp += shares_bhpn[..., : sums_bnp.shape[1]].sum(1, dtype=torch.float32).mT


def _used_positions(weights_bkn: torch.Tensor) -> torch.Tensor:
    """Keys with a weight, (captions, tokens) int64, padded with other keys to equal numbers."""
    used_bk = weights_bkn.any(2)
    most = int(used_bk.sum(1).max()) if len(used_bk) else 0
    wanted = min(max(PAD, most + -most % PAD), used_bk.shape[1])
    return (~used_bk).to(torch.int8).argsort(dim=1, stable=True)[:, :wanted]


def _rows(tokens_bt: torch.Tensor, keys: int, heads: int) -> torch.Tensor:
    """Row numbers of the tokens in (captions * keys * heads, d), by caption, head and token."""
    captions_b11 = torch.arange(len(tokens_bt))[:, None, None]
    heads_h1 = torch.arange(heads)[:, None]
    return ((captions_b11 * keys + tokens_bt[:, None, :]) * heads + heads_h1).flatten()
