"""FC-CLIP's trained half (Yu et al., NeurIPS 2023): masks and their embeddings from a pyramid.

Mask2Former's pixel decoder and masked decoder, as transformers has them, run alone on the feature
maps of a frozen CLIP. Every query gives a mask and an embedding in CLIP's space, which is compared
with the texts of any classes and with a learnt embedding of "none of them" (void). RetCLIP has the
same as its mask generator and in-vocabulary classifier (section 2.2).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from ovref_inference.ranges import STRICT, require_at_least, require_each_at_least

MOST_SCALE = 100.0
"""Highest factor of cosines, as in CLIP."""


@dataclass(frozen=True, kw_only=True)
class MaskDecoderConfig:
    """Sizes of the decoders; the defaults are those of FC-CLIP's released models."""

    __pydantic_config__ = STRICT

    widths: tuple[int, int, int, int]
    """Channels of the feature maps at strides of 4, 8, 16 and 32 pixels: 192, 384, 768 and 1536 of
    ConvNeXt-Large."""
    dim: int
    """Width of CLIP's joint space: 768 of ConvNeXt-Large with `convnext_large_d_320`."""
    queries: int = 250
    """Masks of an image at most."""
    hidden: int = 256
    """Width of both decoders; a multiple of 32 and of `heads`."""
    heads: int = 8
    """Heads of attention."""
    feedforward: int = 2048
    """Width of the masked decoder's feed-forward layers."""
    encoder_feedforward: int = 1024
    """The same of the pixel decoder."""
    encoder_layers: int = 6
    """Layers of the pixel decoder."""
    decoder_layers: int = 9
    """Layers of the masked decoder."""

    def __post_init__(self) -> None:
        require_each_at_least("widths", self.widths, 1)
        for name in ("dim", "queries", "hidden", "heads", "feedforward", "encoder_feedforward",
                     "encoder_layers", "decoder_layers"):  # fmt: skip
            require_at_least(name, getattr(self, name), 1)
        if self.hidden % 32 or self.hidden % self.heads:
            raise ValueError(
                f"hidden must be a multiple of 32 and of heads={self.heads}, found {self.hidden}"
            )


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What one layer says of each query."""

    masks_bqhw: torch.Tensor
    """Logits of masks, at a quarter of the image's size."""
    embeddings_bqd: torch.Tensor
    """In CLIP's joint space, not normalised."""


class MaskDecoder(nn.Module):
    """Pyramid -> masks and embeddings. Weights are random until they are loaded or trained."""

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        self.config = config
        settings = Mask2FormerConfig(
            feature_size=config.hidden,
            mask_feature_size=config.hidden,
            hidden_dim=config.hidden,
            num_queries=config.queries,
            num_attention_heads=config.heads,
            dim_feedforward=config.feedforward,
            encoder_feedforward_dim=config.encoder_feedforward,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers + 1,  # the library counts the queries themselves
            dropout=0.0,
        )
        self.pixel_decoder = Mask2FormerPixelDecoder(settings, list(config.widths))
        self.transformer = Mask2FormerTransformerModule(config.hidden, settings)
        self.pooled_projection = nn.Sequential(
            nn.LayerNorm(config.hidden), nn.Linear(config.hidden, config.hidden)
        )
        self.class_embed = nn.Sequential(
            nn.Linear(config.hidden, config.hidden), nn.ReLU(),
            nn.Linear(config.hidden, config.hidden), nn.ReLU(),
            nn.Linear(config.hidden, config.dim),
        )  # fmt: skip
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.void = nn.Parameter(torch.randn(1, config.dim))
        _Start(settings).begin(self.pixel_decoder, self.transformer)

    def forward(self, maps: list[torch.Tensor], *, every: bool = True) -> list[Decoded]:
        """Masks and embeddings.

        Args:
            maps: (b, width, H / stride, W / stride) each, for strides of 4, 8, 16 and 32.
            every: False gives the output of the last layer alone.

        Returns:
            The outputs before the first layer of the masked decoder and after each; the last is
            the answer, the others are for training.

        Raises:
            ValueError: maps of other widths.
        """
        found = tuple(map_bchw.shape[1] for map_bchw in maps)
        if found != self.config.widths:
            raise ValueError(f"expected maps of widths {self.config.widths}, found {found}")
        decoded = self.pixel_decoder(maps)
        masked = self.transformer(list(decoded.multi_scale_features), decoded.mask_features)
        layers = list(
            zip(masked.intermediate_hidden_states, masked.masks_queries_logits, strict=True)
        )
        return [
            Decoded(
                masks_bqhw=masks_bqhw,
                embeddings_bqd=self._embeddings(
                    states_qbc.transpose(0, 1), masks_bqhw, decoded.mask_features
                ),
            )
            for states_qbc, masks_bqhw in (layers if every else layers[-1:])
        ]

    def _embeddings(
        self, states_bqc: torch.Tensor, masks_bqhw: torch.Tensor, features_bchw: torch.Tensor
    ) -> torch.Tensor:
        pooled_bqc = pooled_under(masks_bqhw, features_bchw)
        return self.class_embed(self.pooled_projection(pooled_bqc) + states_bqc)

    @property
    def scale(self) -> torch.Tensor:
        """The factor of cosines, at most MOST_SCALE."""
        return self.log_scale.exp().clamp(max=MOST_SCALE)


def class_logits(model: Any, embeddings: torch.Tensor, texts_cd: torch.Tensor) -> torch.Tensor:
    """(..., classes + 1) logits of queries, the last of void.

    Args:
        model: a `MaskDecoder` or `OpenMaskFormer`, whose void and scale are taken.
        embeddings: (..., d), not normalised.
        texts_cd: L2-normalised.
    """
    known = torch.cat([texts_cd, normalize(model.void, dim=1)])
    return model.scale * normalize(embeddings, dim=-1) @ known.T


def pooled_under(masks_bqhw: torch.Tensor, features_bchw: torch.Tensor) -> torch.Tensor:
    """(b, q, c): the mean of the cells where a mask's logit is above 0; zero where there is none.

    Args:
        masks_bqhw: logits, brought to the grid of the features by bilinear interpolation; no
            gradient flows into them.
        features_bchw: dense features.
    """
    masks = masks_bqhw.detach()
    if masks.shape[2:] != features_bchw.shape[2:]:
        masks = interpolate(masks, size=features_bchw.shape[2:], mode="bilinear")
    inside = (masks > 0).to(features_bchw.dtype)
    cells = inside.sum((2, 3)).clamp(min=1)
    sums = torch.einsum("bchw,bqhw->bqc", features_bchw, inside)
    return sums / cells[:, :, None]


class _Start(Mask2FormerPreTrainedModel):
    """The library's own random start of modules that stand alone."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)

    def begin(self, *modules: nn.Module) -> None:
        """Starts every part, parents after their children, as the library does."""
        for module in modules:
            for part in reversed(list(module.modules())):
                self._init_weights(part)
