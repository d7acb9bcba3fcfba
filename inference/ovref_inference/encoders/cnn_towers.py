"""Convolutional image towers of open_clip models: feature maps, and features in the joint space.

Their last feature map has a stride of 32 pixels. It comes to the space of the texts after it was
pooled under a mask: by the average and CLIP's projection (ConvNeXt), or by CLIP's own attention
pool (ResNet), both as in FC-CLIP (Yu et al., NeurIPS 2023).
"""

from typing import Any

import open_clip
import torch
from torch.nn.functional import interpolate

from ovref_inference.encoders import timm_towers
from ovref_inference.encoders.towers import Layer, Pool

STRIDES = (4, 8, 16, 32)
"""Pixels per side of a cell in the maps of `pyramid`."""


def is_convnext(visual: Any) -> bool:
    """Whether an image tower is timm's ConvNeXt with an average pool before its head."""
    trunk = getattr(visual, "trunk", None)
    return type(trunk).__name__ == "ConvNeXt" and "pool" not in dict(visual.head.named_children())


def is_resnet(visual: Any) -> bool:
    """Whether an image tower is OpenAI's ResNet with an attention pool (RN50 to RN50x64)."""
    return isinstance(visual, open_clip.modified_resnet.ModifiedResNet)


def pyramid(visual: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Feature maps of a ConvNeXt or ResNet, one for each of STRIDES.

    Args:
        visual: a tower of `is_convnext` or `is_resnet`.
        pixels: (n, 3, H, W), as its model normalises them; sides that are multiples of 32.

    Returns:
        (n, c, H / stride, W / stride) each; the last is what is pooled.
    """
    if is_resnet(visual):
        maps = visual.forward_intermediates(pixels, indices=[1, 2, 3, 4], intermediates_only=True)
        return maps["image_intermediates"]
    trunk, maps = visual.trunk, []
    carried = trunk.stem(pixels)
    for stage in trunk.stages:
        carried = stage(carried)
        maps.append(carried)
    return [*maps[:-1], trunk.norm_pre(carried)]


def widths(visual: Any) -> list[int]:
    """Channels of each map of `pyramid`."""
    if is_resnet(visual):
        layers = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        return [layer[-1].conv3.out_channels for layer in layers]
    return [info["num_chs"] for info in visual.trunk.feature_info]


@torch.no_grad()
def joint_width(visual: Any) -> int:
    """Width of the joint space."""
    if is_resnet(visual):
        return visual.output_dim
    weights = next(visual.parameters())
    return trunk_head(visual)(weights.new_zeros(1, widths(visual)[-1])).shape[1]


def trunk_head(visual: Any) -> Layer:
    """(m, c) of a trunk of timm -> (m, d): its pool, norm and projection into the joint space.

    Applied to what is pooled under a mask (FC-CLIP): pooled over the whole image, the features of a
    network with an average pool give the image's own CLIP embedding.
    """
    trunk = timm_towers.head(visual.trunk)
    return lambda rows: visual.head(trunk(rows))


def resnet_features(visual: Any, grid_hw: tuple[int, int]) -> tuple[Layer, Layer, Pool]:
    """A ResNet's dense features, and its attention pool on single cells and under masks (FC-CLIP).

    Args:
        visual: a tower of `is_resnet`.
        grid_hw: usual rows and columns of its last feature map; its learned positions are
            interpolated to those of each image.

    Returns:
        Pixels (n, 3, H, W) -> (n, cells, c), the last feature map with its positions; (m, c) ->
        (m, d), the attention pool on one cell alone, which is its value, projected; and
        `attention_pooled` for maps of any grid.
    """
    attention = visual.attnpool
    first = cell_positions(attention, grid_hw)

    def positions(grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        return (first if grid == grid_hw else cell_positions(attention, grid)).to(like)

    def cells(pixels: torch.Tensor) -> torch.Tensor:
        found = pyramid(visual, pixels)[-1]
        height, width = found.shape[2:]
        return found.flatten(2).transpose(1, 2) + positions((height, width), found)

    def head(one: torch.Tensor) -> torch.Tensor:
        return attention.c_proj(attention.v_proj(one))

    def pool(map_lc: torch.Tensor, weights_nl: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return attention_pooled(attention, map_lc, weights_nl, positions(grid, map_lc))

    return cells, head, pool


def cell_positions(attention: Any, grid_hw: tuple[int, int]) -> torch.Tensor:
    """(cells, c): an attention pool's learned positions of the cells of another grid, bilinear
    between those of its own."""
    learned = attention.positional_embedding.detach()[1:]
    side = round(len(learned) ** 0.5)
    grid = learned.T.reshape(1, -1, side, side)
    if grid_hw != (side, side):
        grid = interpolate(grid, size=grid_hw, mode="bilinear")
    return grid[0].flatten(1).T


def attention_pooled(
    attention: Any, map_lc: torch.Tensor, weights_nl: torch.Tensor, positions_lc: torch.Tensor
) -> torch.Tensor:
    """CLIP's attention pool of one image, once for each mask.

    The query is that of the whole image, the mean of its cells, and only cells under the mask are
    attended to (FC-CLIP). A cell of which the mask covers a part counts by that part: its logarithm
    is added to the attention's logit, so that equal logits give the mean weighted by coverage.

    Args:
        attention: the tower's `attnpool`.
        map_lc: (cells, c) of one image, with positions.
        weights_nl: (n, cells) in [0, 1], the covered part of each cell; no row of zeros alone.
        positions_lc: (cells, c) that are in `map_lc`.

    Returns:
        (n, d) in the joint space.
    """
    whole = (map_lc - positions_lc).mean(0) + attention.positional_embedding[0].to(map_lc)
    heads = attention.num_heads
    query_hd = attention.q_proj(whole).reshape(heads, -1)
    keys_lhd = attention.k_proj(map_lc).reshape(len(map_lc), heads, -1)
    values_lhd = attention.v_proj(map_lc).reshape(len(map_lc), heads, -1)
    logits_hl = torch.einsum("hd,lhd->hl", query_hd, keys_lhd) / query_hd.shape[1] ** 0.5
    shares_nhl = (logits_hl + weights_nl.log()[:, None]).softmax(2)
    return attention.c_proj(torch.einsum("nhl,lhd->nhd", shares_nhl, values_lhd).flatten(1))
