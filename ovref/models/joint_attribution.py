"""Attribution heatmaps of diffusion transformers: what image positions have to do with a noun.

Diffusion transformers attend over image and text in one sequence (joint attention), or keep
cross-attention from image to text. All their blocks have the same grid of image positions, so one
float32 buffer holds a whole batch, however many blocks and steps are read. There are two readings:

- `share`, after DAAM (Tang et al., ACL 2023) and Seg4Diff (Kim et al., NeurIPS 2025): the
  probability with which an image position attends to a token of the noun, the mean over heads,
  blocks and steps;
- `output`, after ConceptAttention (Helbling et al., ICML 2025, section 4): the scalar product of
  the attention's output at an image position and its output at the noun's tokens, over all heads,
  the mean over blocks and steps. It needs joint attention, where tokens have outputs too. Three
  differences: the noun's vectors are those of its own tokens in the caption, not of a separate
  stream of concepts; the products are summed inside the block, so that no vector is kept; and there
  is no softmax over concepts, because a caption may have a single noun. Only differences between
  positions mean something, so the smallest value of a heatmap is 0.

The attention itself stays the fused `scaled_dot_product_attention` on the same inputs, called by
diffusers' own processors: it is intercepted while the attention modules of the chosen blocks run.
Images are bit-identical to those generated without attribution. The softmax is not materialised:

- where the fused kernel also returns the logarithm of each softmax's denominator (on a CPU; on a
  GPU without a mask and not compiled), exp(q k - log denominator) is computed only for the few
  tokens of nouns;
- elsewhere a second fused attention, from the image positions, has the nouns' weights as values,
  which on an H100 costs five times as much and is less exact in half precision.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from ovref.errors import ModelError
from ovref.models.attribution import PAD, shares_of_tokens

Reading = Literal["share", "output"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where image and text lie in the sequence over which a block attends."""

    image: Literal["first", "last", "queries"]
    """`first` or `last`: image positions come before or after the text in queries and keys alike.
    `queries`: cross-attention; queries are the image, keys are the text."""
    image_multiple: int = 1
    """Image positions are padded to a multiple of this, if they come first."""
    conditional: Literal["first", "last"] = "last"
    """Which half of a guided batch is the captions' own."""

    def starts(self, positions: int, keys: int) -> tuple[int, int]:
        """The first query of the image and the first key of the text."""
        if self.image == "queries":
            return 0, 0
        if self.image == "last":
            return keys - positions, 0
        return 0, positions + -positions % self.image_multiple


class JointAttribution:
    """Accumulated attribution of a batch; created by `recording`, read with `heatmaps_bnhw`."""

    def __init__(
        self,
        positions: Sequence[Sequence[Sequence[int]]],
        grid_hw: tuple[int, int],
        layout: Layout,
        reading: Reading,
        *,
        device: Any = "cpu",
    ):
        """
        Args:
            positions: per caption, per noun, the positions of its tokens in the text.
            grid_hw: height and width of the grid of image positions.
            layout: where image and text lie.
            reading: `share` or `output`.
            device: of the accumulators.
        """
        self.active = True
        """Whether attention is read at present: outside the steps that count it is not."""
        self._grid_hw, self._layout, self._reading = grid_hw, layout, reading
        self._captions = len(positions)
        self._nouns = max((len(nouns) for nouns in positions), default=0)
        tokens_bt, weights_bnt = _tokens_and_weights(positions)
        self._last_token = max(
            (t for nouns in positions for noun in nouns for t in noun), default=0
        )
        self._tokens_b1t1 = tokens_bt[:, None, :, None].to(device)
        self._weights_bnt = weights_bnt.to(device)
        self._positions = grid_hw[0] * grid_hw[1]
        self._sums_bnp = torch.zeros(
            self._captions, weights_bnt.shape[1], self._positions, device=device
        )
        self._maps = torch.zeros((), dtype=torch.int64, device=device)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """`scaled_dot_product_attention`, which also adds a block's attribution at one step.

        Args:
            query: (rows, heads, queries, d), rows being the captions, or under guidance the
                captions and their unconditional twins.
            key: (rows, heads, keys, d).
            value: (rows, heads, keys, d).
            attn_mask: of booleans or of numbers to add; no noun's token may be masked.
            scale: of the products; None for 1 / sqrt(d).
            dropout_p, is_causal, enable_gqa: must have these values.

        Returns:
            (rows, heads, queries, d).

        Raises:
            ModelError: rows, queries or keys do not belong to the captions being recorded.
        """
        if dropout_p or is_causal or enable_gqa:
            raise ModelError(
                "attention with dropout, a causal mask or fewer keys' heads than queries' heads "
                "cannot be recorded"
            )
        image, text = self._starts(query, key)
        log_sums_bhq = None
        if self._reading == "share":
            output, log_sums_bhq = attention_and_log_sums(query, key, value, attn_mask, scale)
        else:
            output = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, scale=scale
            )
        rows, heads = query.shape[:2]
        first = 0 if self._layout.conditional == "first" else rows - self._captions
        own, of_image = slice(first, first + self._captions), slice(image, image + self._positions)
        if self._reading == "output":
            self._add_products(output[own], of_image, text)
            self._maps += 1
            return output
        self._maps += heads
        query, key = query[own, :, of_image], key[own]
        if log_sums_bhq is not None:
            self._add_tokens(query, key[:, :, text:], log_sums_bhq[own, :, of_image], scale)
            return output
        if attn_mask is not None:
            everything = (*[1] * (4 - attn_mask.ndim), *attn_mask.shape)
            attn_mask = attn_mask.view(everything)
            attn_mask = attn_mask if len(attn_mask) == 1 else attn_mask[own]
            attn_mask = attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, of_image]
        self._add_second_product(query, key, text, attn_mask, scale)
        return output

    def heatmaps_bnhw(self) -> torch.Tensor:
        """The heatmaps, (captions, nouns, h, w) float32 >= 0 at the size of the grid.

        `share`: the mean probability, over blocks, heads and steps, with which the position attends
        to a token of the noun. `output`: the mean product, over blocks and steps, less its smallest
        value. All zero for a noun without tokens.

        Raises:
            ModelError: nothing was recorded.
        """
        maps = int(self._maps)
        if maps == 0:
            raise ModelError(
                "no attention was recorded: none of the chosen blocks and steps ran, or diffusers "
                "uses another attention backend than PyTorch's (DIFFUSERS_ATTN_BACKEND must be "
                "unset)"
            )
        means_bnp = self._sums_bnp[:, : self._nouns] / maps
        if self._reading == "output" and self._nouns:
            means_bnp = means_bnp - means_bnp.amin(2, keepdim=True)
        return means_bnp.unflatten(2, self._grid_hw)

    def _starts(self, query_bhqd: torch.Tensor, key_bhkd: torch.Tensor) -> tuple[int, int]:
        rows, queries, keys = query_bhqd.shape[0], query_bhqd.shape[2], key_bhkd.shape[2]
        if rows not in (self._captions, 2 * self._captions):
            raise ModelError(
                f"attention of {rows} rows while recording {self._captions} captions: expected "
                "one row per caption, two under guidance"
            )
        image, text = self._layout.starts(self._positions, keys)
        in_text = image if self._layout.image == "last" else keys - text
        wanted = self._positions if self._layout.image == "queries" else keys
        if queries != wanted or in_text <= self._last_token:
            raise ModelError(
                f"attention of {queries} queries over {keys} keys while recording a grid of "
                f"{self._grid_hw} image positions ({self._layout.image}) and nouns up to token "
                f"{self._last_token}: the sequence is not laid out as expected of this model"
            )
        return image, text

    def _add_tokens(
        self,
        query_bhpd: torch.Tensor,
        key_bhkd: torch.Tensor,
        log_sums_bhp: torch.Tensor,
        scale: float | None,
    ) -> None:
        """Adds exp(scale * q k - log of the softmax's denominator), at the nouns' tokens."""
        captions, heads, _, depth = query_bhpd.shape
        key_bhtd = key_bhkd.gather(2, self._tokens_b1t1.expand(-1, heads, -1, depth))
        shares_xtp = shares_of_tokens(query_bhpd, key_bhtd.flatten(0, 1), log_sums_bhp, scale)
        # The weights are the same for all heads, so these are summed first.
        shares_btp = shares_xtp.unflatten(0, (captions, heads)).sum(1)
        self._sums_bnp.baddbmm_(self._weights_bnt, shares_btp)

    def _add_second_product(
        self,
        query_bhpd: torch.Tensor,
        key_bhkd: torch.Tensor,
        text: int,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        """Adds the fused attention whose values are the nouns' weights."""
        captions, heads, keys, depth = key_bhkd.shape
        nouns = self._weights_bnt.shape[1]
        # Fused kernels need values as wide as queries.
        values_bkd = key_bhkd.new_zeros(captions, keys, max(depth, nouns))
        tokens_btn = (text + self._tokens_b1t1[:, 0]).expand(-1, -1, nouns)
        values_bkd[..., :nouns].scatter_add_(
            1, tokens_btn, self._weights_bnt.mT.to(values_bkd.dtype)
        )
        shares_bhpn = functional.scaled_dot_product_attention(
            query_bhpd,
            key_bhkd,
            values_bkd[:, None].expand(-1, heads, -1, -1),
            attn_mask=mask,
            scale=scale,
        )
        self._sums_bnp += shares_bhpn[..., :nouns].sum(1, dtype=torch.float32).mT

    def _add_products(self, output_bhqd: torch.Tensor, of_image: slice, text: int) -> None:
        """Adds the products of the outputs at image positions and at the nouns' tokens."""
        heads, depth = output_bhqd.shape[1], output_bhqd.shape[3]
        tokens_bhtd = output_bhqd[:, :, text:].gather(
            2, self._tokens_b1t1.expand(-1, heads, -1, depth)
        )
        tokens_btc = tokens_bhtd.transpose(1, 2).flatten(2).float()
        image_bpc = output_bhqd[:, :, of_image].transpose(1, 2).flatten(2).float()
        self._sums_bnp.baddbmm_(torch.bmm(self._weights_bnt, tokens_btc), image_bpc.mT)


def attention_and_log_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The fused attention, with the bits of `scaled_dot_product_attention`, and where its kernel
    returns them, the logarithms of the softmaxes' denominators, (rows, heads, queries) float32;
    otherwise None."""
    if query.device.type == "cpu":
        output, log_sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=_additive(mask, query.dtype), scale=scale
        )
        return output, log_sums
    # A compiler cannot trace the choice of a kernel.
    if query.device.type == "cuda" and mask is None and not torch.compiler.is_compiling():
        chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, scale=scale))
        found = attention_by(chosen, query, key, value, scale)
        if found is not None:
            return found
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output, None


def attention_by(
    chosen: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`attention_and_log_sums` by the operator behind one of PyTorch's backends for a GPU; None if
    it has no denominators."""
    if chosen == SDPBackend.CUDNN_ATTENTION:
        output, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, scale=scale
        )
    # The public function pads depths that are no multiples of 8.
    elif chosen == SDPBackend.FLASH_ATTENTION and query.shape[3] % 8 == 0:
        output, log_sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, scale=scale
        )
    else:
        return None
    return output, log_sums.reshape(query.shape[:3])


def _tokens_and_weights(
    positions: Sequence[Sequence[Sequence[int]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of any noun of each caption, (captions, tokens) int64 padded with 0, and the weights
    that average each noun's tokens, (captions, nouns, tokens) float32, 0 at the padding."""
    used = [sorted({token for noun in nouns for token in noun}) for nouns in positions]
    tokens = max(PAD, max((len(found) for found in used), default=0))
    most = max((len(nouns) for nouns in positions), default=0)
    tokens_bt = torch.zeros(len(positions), tokens + -tokens % PAD, dtype=torch.int64)
    weights_bnt = torch.zeros(len(positions), most + -most % PAD, tokens_bt.shape[1])
    for b, (nouns, found) in enumerate(zip(positions, used, strict=True)):
        tokens_bt[b, : len(found)] = torch.tensor(found, dtype=torch.int64)
        for n, noun in enumerate(nouns):
            for token in noun:
                weights_bnt[b, n, found.index(token)] = 1 / len(noun)
    return tokens_bt, weights_bnt


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of booleans (True: attend) as numbers that are added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class _Intercepting(TorchFunctionMode):
    """Has an attribution attend in place of `scaled_dot_product_attention`."""

    def __init__(self, attribution: JointAttribution):
        super().__init__()
        self._attribution = attribution

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention and self._attribution.active:
            return self._attribution.attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def recording(
    network: Any,
    attentions: Sequence[Any],
    attribution: JointAttribution,
    counted: Sequence[bool],
) -> Iterator[None]:
    """Records the attention of a diffusion transformer while it runs inside the block.

    Everything is as it was at the end in any case.

    Args:
        network: the transformer.
        attentions: its attention modules that are read.
        attribution: what reads them.
        counted: for each call of the network in the block, whether it is read.

    Raises:
        ModelError: the network was not called so often, so that other calls were read than meant.
    """
    calls = 0

    def called(*_: Any) -> None:
        nonlocal calls
        attribution.active = calls < len(counted) and counted[calls]
        calls += 1

    before = [attn.__dict__.get("forward") for attn in attentions]
    hook = network.register_forward_pre_hook(called)
    try:
        for attn in attentions:
            attn.forward = _intercepted(attn.forward, attribution)
        yield
    finally:
        hook.remove()
        for attn, forward in zip(attentions, before, strict=True):
            if forward is None:
                del attn.forward
            else:
                attn.forward = forward
    if calls != len(counted):
        raise ModelError(
            f"{type(network).__name__} ran {calls} times for a batch of images, expected "
            f"{len(counted)}: its scheduler makes more or fewer steps than asked for, so steps "
            "cannot be told apart; choose another scheduler or number of steps"
        )


def _intercepted(forward: Callable[..., Any], attribution: JointAttribution) -> Callable[..., Any]:
    def attends(*args: Any, **options: Any) -> Any:
        with _Intercepting(attribution):
            return forward(*args, **options)

    return attends
