"""MaskFormer with open classes (VOCSeg section 3.2, after Xu et al.: zsseg, Liang et al.: OVSeg).

Every query gives an embedding in CLIP's space in place of scores of the trained classes. It is
compared with the texts of any classes and with a learnt embedding of no object. A model is a folder
of transformers' layout, whose config.json has `open_classes` besides:

    widths          of the layers that make an embedding of a query, the first and the last included
    scale           factor of cosines
    templates       those that it was trained with
    texts           how many texts of trained classes are stored; 0 where they are unknown
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import (
    DetrConfig,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerSwinConfig,
)

from ovref_inference.proposers.mask_decoder import Decoded
from ovref_inference.ranges import (
    STRICT,
    require_above,
    require_at_least,
    require_each_at_least,
    require_within,
)

SCALE = 100.0
"""Factor of cosines of OVSeg and zsseg."""


@dataclass(frozen=True, kw_only=True)
class OpenMaskFormerConfig:
    """Sizes; the defaults are OVSeg's with Swin-B."""

    __pydantic_config__ = STRICT

    embed_dim: int = 128
    """Width of the Swin's first stage."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Layers of each of its stages."""
    swin_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Heads of attention in each of its stages."""
    window: int = 12
    """Patches in a row of its windows."""
    patch: int = 4
    """Pixels in a row of its patches."""
    mlp_ratio: float = 4.0
    """Width of its feed-forward layers, in widths of their stage."""
    drop_path: float = 0.3
    """Greatest share of its layers that is left out in training."""
    features: int = 256
    """Width of the pixel decoder; a multiple of 32."""
    mask_features: int = 256
    """Width of the pixel embeddings that masks are made from."""
    queries: int = 100
    """Masks of an image at most."""
    hidden: int = 256
    """Width of the decoder of queries."""
    decoder_layers: int = 6
    """Its layers."""
    heads: int = 8
    """Its heads of attention."""
    feedforward: int = 2048
    """Width of its feed-forward layers."""
    dropout: float = 0.1
    """Share of its values that is dropped in training."""
    class_layers: int = 2
    """Layers that make an embedding of a query; the hidden ones are as wide as the embedding."""

    def __post_init__(self) -> None:
        for name in (
            "embed_dim", "window", "patch", "features", "mask_features", "queries", "hidden",
            "decoder_layers", "heads", "feedforward", "class_layers",
        ):  # fmt: skip
            require_at_least(name, getattr(self, name), 1)
        for name in ("depths", "swin_heads"):
            require_each_at_least(name, getattr(self, name), 1)
        require_above("mlp_ratio", self.mlp_ratio, 0)
        for name in ("drop_path", "dropout"):
            require_within(name, getattr(self, name), 0, 1, "[)")
        if len(self.depths) != 4 or len(self.swin_heads) != 4:
            raise ValueError("depths and swin_heads must have a number for each of four stages")
        if self.features % 32 or self.hidden % self.heads:
            raise ValueError("features must be a multiple of 32, and hidden one of heads")


def settings_of(
    config: OpenMaskFormerConfig,
    names: Sequence[str],
    dim: int,
    *,
    templates: Sequence[str],
    texts: int,
    widths: Sequence[int] = (),
) -> MaskFormerConfig:
    """transformers' settings of a model.

    Args:
        config: sizes.
        names: of the classes that it is trained on.
        dim: width of CLIP's joint space.
        templates: those that it is trained with.
        texts: how many texts of trained classes it stores.
        widths: of the layers that make an embedding, if they are others than `class_layers` says.
    """
    found = MaskFormerConfig(
        backbone_config=MaskFormerSwinConfig(  # type: ignore[call-arg]
            image_size=384, patch_size=config.patch, embed_dim=config.embed_dim,
            depths=list(config.depths), num_heads=list(config.swin_heads),
            window_size=config.window, mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            out_features=[f"stage{i + 1}" for i in range(len(config.depths))],
        ),
        decoder_config=DetrConfig(
            d_model=config.hidden, num_queries=config.queries, encoder_layers=0,
            decoder_layers=config.decoder_layers, decoder_attention_heads=config.heads,
            encoder_attention_heads=config.heads,
            decoder_ffn_dim=config.feedforward, dropout=config.dropout,
        ),
        fpn_feature_size=config.features,
        mask_feature_size=config.mask_features,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )  # fmt: skip
    found.open_classes = {
        "widths": list(widths) or [config.hidden, *[dim] * config.class_layers],
        "scale": SCALE, "templates": list(templates), "texts": texts,
    }  # fmt: skip
    return found


def processing(
    short_side: int, long_side: int, mean: Sequence[float], std: Sequence[float]
) -> MaskFormerImageProcessor:
    """The image processor that is stored beside a model.

    Args:
        short_side: that images are brought to.
        long_side: at most.
        mean, std: of normalised pixels, whose values are from 0 to 1 before.
    """
    return MaskFormerImageProcessor(
        size={"shortest_edge": short_side, "longest_edge": long_side}, size_divisor=32,
        image_mean=list(mean), image_std=list(std),
    )  # fmt: skip


class OpenMaskFormer(MaskFormerForInstanceSegmentation):
    """transformers' MaskFormer, whose `class_queries_logits` are embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.open_classes
        widths = settings["widths"]
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            steps += [nn.Linear(before, after), nn.ReLU()]
        self.class_predictor = nn.Sequential(*steps[:-1])  # type: ignore[assignment]
        self.void = nn.Parameter(torch.randn(1, widths[-1]) * widths[-1] ** -0.5)
        self.trained_texts: torch.Tensor
        self.register_buffer("trained_texts", torch.zeros(settings["texts"], widths[-1]))

    def every_layer(self, pixels: torch.Tensor) -> list[Decoded]:
        """The masks and embeddings after each layer of the decoder, for training; the last are the
        answer.

        Args:
            pixels: (b, 3, H, W), normalised.
        """
        decoder: Any = self.model.transformer_module.decoder
        states: list[torch.Tensor] = []
        # transformers keeps no layer's queries as its own loss would need them.
        hooks = [
            layer.register_forward_hook(lambda _layer, _given, found: states.append(found))
            for layer in decoder.layers
        ]
        try:
            features_bchw = self.model(pixel_values=pixels).pixel_decoder_last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        queries = [decoder.layernorm(state_bqc) for state_bqc in states]
        return [
            Decoded(
                masks_bqhw=torch.einsum("bqc,bchw->bqhw", self.mask_embedder(one), features_bchw),
                embeddings_bqd=self.class_predictor(one),
            )
            for one in queries
        ]

    @property
    def scale(self) -> float:
        """The factor of cosines."""
        return self.config.open_classes["scale"]

    @property
    def templates(self) -> tuple[str, ...]:
        """Those that it was trained with."""
        return tuple(self.config.open_classes["templates"])
