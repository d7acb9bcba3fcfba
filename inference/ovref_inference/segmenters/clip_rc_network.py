"""CLIP-RC's network: Zhang et al., Exploring Regional Clues in CLIP, CVPR 2024, sections 3.2-3.4.

A frozen CLIP ViT sees its class token, trained prompts, patches and the region-level bridge: tokens
that begin as copies of the class token, each of which sees the patches of one region alone. The
decoder compares patches with descriptors of every class in every region.

Shapes: n images, p patches of a grid, m regions, c classes, d the width of CLIP's joint space.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize

from ovref_inference.encoders.clip_towers import cell_pixels, is_vit, load_clip, resize_positions
from ovref_inference.encoders.towers import pair
from ovref_inference.errors import ModelError
from ovref_inference.pixels import Pixels
from ovref_inference.segmenters.clip_rc_config import ClipRcNetworkConfig


class Encoded(NamedTuple):
    """What the ViT says of images, L2-normalised, in CLIP's joint space."""

    whole_nd: torch.Tensor
    """The image: G of the paper."""
    regions_nmd: torch.Tensor
    """Each region, row by row: R; m is 0 without a bridge."""
    patches_npd: torch.Tensor
    """Each patch, row by row: I."""


class Recovery(NamedTuple):
    """What the recovery decoder gives, and what it should have given (eq. 10)."""

    patches_npd: torch.Tensor
    wanted_patches_npd: torch.Tensor
    descriptors_nqe: torch.Tensor
    """q is m * c, e is 2 * d."""
    wanted_descriptors_nqe: torch.Tensor


class ClipRcOutput(NamedTuple):
    """What the network says of images."""

    logits_nchw: torch.Tensor
    """One score for each class on the grid of patches; their sigmoids are probabilities that do not
    exclude each other."""
    recovery: Recovery | None
    """In training only."""


def bridge_mask(grid_hw: tuple[int, int], root: int, prompts: int) -> torch.Tensor:
    """(e, e) float32: -inf where a token (row) must not see another one (column), 0 elsewhere.

    The tokens are the class token, the prompts, the patches and root * root regions (fig. 5). A
    region and the patches of its block see each other, and a region sees itself; otherwise regions
    see nothing and nothing sees them. All other tokens see each other.

    Raises:
        ValueError: the root does not divide the grid.
    """
    rows, columns = grid_hw
    if rows % root or columns % root:
        raise ValueError(
            f"{root * root} regions ({root} x {root}) do not divide a grid of {rows} x {columns} "
            "patches: choose another number of regions or another size_hw"
        )
    row_of, column_of = (torch.arange(side) * root // side for side in grid_hw)
    region_of_p = (row_of[:, None] * root + column_of).flatten()
    others, regions = 1 + prompts, torch.arange(root * root)
    hidden = torch.zeros(others + len(region_of_p) + len(regions), dtype=torch.bool)
    first = len(hidden) - len(regions)
    hidden_ee = hidden.repeat(len(hidden), 1)
    hidden_ee[first:] = True
    hidden_ee[:, first:] = True
    inside_mp = region_of_p == regions[:, None]
    hidden_ee[first:, others:first] = ~inside_mp
    hidden_ee[others:first, first:] = ~inside_mp.T
    hidden_ee[first:, first:] = ~torch.eye(len(regions), dtype=torch.bool)
    return torch.zeros(hidden_ee.shape).masked_fill(hidden_ee, -math.inf)


class BridgedVit(nn.Module):
    """A frozen ViT of open_clip with trained prompts in every layer and the region-level bridge."""

    mask_ee: torch.Tensor | None

    def __init__(self, visual: Any, config: ClipRcNetworkConfig) -> None:
        """`visual` is of open_clip, its positions already those of the grid; it is frozen here."""
        super().__init__()
        self.visual = visual.requires_grad_(False).eval()
        self.grid_hw: tuple[int, int] = tuple(visual.grid_size)
        self.regions, self.prompts = config.regions, config.prompts
        mask = bridge_mask(self.grid_hw, config.root, config.prompts) if config.regions else None
        self.register_buffer("mask_ee", mask, persistent=False)
        layers, width = len(visual.transformer.resblocks), visual.class_embedding.shape[0]
        if config.prompts:
            self.prompts_lkw = nn.Parameter(torch.empty(layers, config.prompts, width))
            spread = math.sqrt(6 / (3 * math.prod(pair(visual.patch_size)) + width))
            nn.init.uniform_(self.prompts_lkw, -spread, spread)
            self.project = nn.Linear(width, width)
            nn.init.kaiming_normal_(self.project.weight, mode="fan_out")
            nn.init.zeros_(self.project.bias)
            self.prompt_norm = nn.LayerNorm(width, eps=1e-6)
            self.drop = nn.Dropout(config.dropout)
        if config.update_regions:
            self.regions_mw = nn.Parameter(self._class_token().repeat(config.regions, 1))

    def train(self, mode: bool = True) -> "BridgedVit":
        """Sets the mode of every part but CLIP, which always evaluates."""
        super().train(mode)
        self.visual.eval()
        return self

    def forward(self, pixels: torch.Tensor) -> Encoded:
        """(n, 3, H, W) normalised pixels -> embeddings of image, regions and patches."""
        visual, n = self.visual, len(pixels)
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        own = getattr(self, "regions_mw", None)
        if own is None:
            own = self._class_token().expand(self.regions, -1)
        tokens = torch.cat(
            [
                self._class_token().expand(n, 1, -1),
                patches + visual.positional_embedding[1:],
                own.expand(n, -1, -1),
            ],
            dim=1,
        )
        tokens = visual.ln_pre(tokens)
        for layer, block in enumerate(visual.transformer.resblocks):
            if self.prompts:
                prompts = self.drop(self.project(self.prompts_lkw[layer])).expand(n, -1, -1)
                tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
            tokens = block(tokens, attn_mask=self.mask_ee)
            if self.prompts:  # those of the next layer take their place
                tokens = torch.cat([tokens[:, :1], tokens[:, 1 + self.prompts :]], dim=1)
        seen = tokens.shape[1] - self.regions
        if self.prompts:
            tokens = torch.cat([self.prompt_norm(tokens[:, :seen]), tokens[:, seen:]], dim=1)
        joint = normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)
        return Encoded(joint[:, 0], joint[:, seen:], joint[:, 1:seen])

    def _class_token(self) -> torch.Tensor:
        return self.visual.class_embedding + self.visual.positional_embedding[0]


def aligned_patches(
    encoded: Encoded, grid_hw: tuple[int, int], align: tuple[str, ...]
) -> torch.Tensor:
    """Eq. 4: (n, p, d times one more than `align` has), the image, the region and the patch.

    Regions come to the grid of patches by bilinear interpolation.
    """
    patches = encoded.patches_npd
    parts = []
    if "global" in align:
        parts.append(encoded.whole_nd[:, None].expand_as(patches))
    if "regions" in align:
        root = math.isqrt(encoded.regions_nmd.shape[1])
        regions = encoded.regions_nmd.transpose(1, 2).unflatten(2, (root, root))
        parts.append(interpolate(regions, size=grid_hw, mode="bilinear").flatten(2).transpose(1, 2))
    return torch.cat([*parts, patches], dim=-1)


def descriptors(encoded: Encoded, classes_cd: torch.Tensor) -> torch.Tensor:
    """Eq. 5 and 6: (n, m * c, 2 * d), class by class of each region in turn.

    Without a bridge the image is the one region, which makes ZegCLIP's relationship descriptor.
    """
    about_nmd = encoded.whole_nd[:, None]
    if encoded.regions_nmd.shape[1]:
        about_nmd = about_nmd + encoded.regions_nmd
    related = about_nmd[:, :, None] * classes_cd
    return torch.cat([related, classes_cd.expand_as(related)], dim=-1).flatten(1, 2)


class CrossLayer(nn.Module):
    """Attention to others and a feed-forward network, a norm after each."""

    def __init__(self, dim: int, config: ClipRcNetworkConfig) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            dim, config.heads, dropout=config.dropout, batch_first=True
        )
        self.norm_attended, self.norm_fed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, config.ffn), nn.Linear(config.ffn, dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """(n, a, d) and (n, b, d) -> (n, a, d)."""
        attended, _ = self.attention(own, others, others, need_weights=False)
        own = self.norm_attended(own + self.drop(attended))
        fed = self.linear2(self.drop(torch.relu(self.linear1(own))))
        return self.norm_fed(own + self.drop(fed))


class TwinLayer(nn.Module):
    """Two cross-attending branches: each attends to what the other one was before the layer."""

    def __init__(self, dim: int, config: ClipRcNetworkConfig) -> None:
        super().__init__()
        self.queries, self.patches = CrossLayer(dim, config), CrossLayer(dim, config)

    def forward(
        self, queries_nqd: torch.Tensor, patches_npd: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 7: both updated."""
        return self.queries(queries_nqd, patches_npd), self.patches(patches_npd, queries_nqd)


class TwinDecoder(nn.Module):
    """Linear maps to the decoder's width, and its layers (eq. 7, eq. 9)."""

    def __init__(
        self, query_dim: int, patch_dim: int, dim: int, layers: int, config: ClipRcNetworkConfig
    ) -> None:
        super().__init__()
        self.queries, self.patches = nn.Linear(query_dim, dim), nn.Linear(patch_dim, dim)
        twins = [TwinLayer(dim, config) for _ in range(layers)]
        self.layers = nn.ModuleList(twins)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for twin in twins:
            nn.init.zeros_(twin.patches.linear2.weight)

    def forward(
        self, queries_nqe: torch.Tensor, patches_npe: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, q, dim) and (n, p, dim)."""
        queries, patches = self.queries(queries_nqe), self.patches(patches_npe)
        for layer in self.layers:
            queries, patches = layer(queries, patches)
        return queries, patches


class RecoveryDecoder(nn.Module):
    """Eq. 9: brings what the decoder made back to what it was made from."""

    def __init__(self, dim: int, config: ClipRcNetworkConfig) -> None:
        super().__init__()
        self.decoder = TwinDecoder(dim, dim, dim, config.recovery_layers, config)
        self.descriptors, self.patches = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(
        self, queries_nqd: torch.Tensor, patches_npd: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, q, 2 * d) descriptors and (n, p, d) patches."""
        queries, patches = self.decoder(queries_nqd, patches_npd)
        return self.descriptors(queries), self.patches(patches)


class ClipRcNetwork(nn.Module):
    """The whole network. Made by `load_network`; only its trained parts require gradients."""

    def __init__(self, visual: Any, config: ClipRcNetworkConfig) -> None:
        super().__init__()
        self.config = config
        dim = visual.proj.shape[1]
        if dim % config.heads:
            raise ValueError(f"heads must divide {dim}, CLIP's joint width, found {config.heads}")
        self.dim: int = dim
        self.encoder = BridgedVit(visual, config)
        patch_dim = dim * (1 + len(config.align))
        self.decoder = TwinDecoder(2 * dim, patch_dim, dim, config.layers, config)
        self.recovery = RecoveryDecoder(dim, config) if config.recovery_layers else None

    def forward(self, pixels: torch.Tensor, classes_cd: torch.Tensor) -> ClipRcOutput:
        """Scores of classes on the grid of patches.

        Args:
            pixels: (n, 3, H, W), normalised for CLIP, of the configured size.
            classes_cd: (c, d) embeddings of the classes in CLIP's joint space, L2-normalised.
        """
        encoded, grid_hw = self.encoder(pixels), self.encoder.grid_hw
        wanted = descriptors(encoded, classes_cd)
        aligned = aligned_patches(encoded, grid_hw, self.config.align)
        queries, patches = self.decoder(wanted, aligned)
        # Eq. 8: the mean over regions of products is the product with the mean over regions.
        mean_ncd = queries.unflatten(1, (-1, len(classes_cd))).mean(1)
        logits = (mean_ncd @ patches.transpose(1, 2)).unflatten(2, grid_hw)
        if self.recovery is None or not self.training:
            return ClipRcOutput(logits, None)
        found, recovered = self.recovery(queries, patches)
        recovery = Recovery(recovered, encoded.patches_npd.detach(), found, wanted.detach())
        return ClipRcOutput(logits, recovery)

    def trained_state(self, with_recovery: bool = True) -> dict[str, torch.Tensor]:
        """The weights that training changes, by name; inference needs none of the recovery's."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and (with_recovery or not name.startswith("recovery."))
        }


def load_network(config: ClipRcNetworkConfig, device: torch.device) -> tuple[ClipRcNetwork, Pixels]:
    """A network whose trained parts are new, in evaluation mode, and its preprocessing.

    Raises:
        ModelError: CLIP cannot be loaded, is no ViT with a class token of its own embedding, or the
            size, the regions or the heads do not fit it.
    """
    model, _ = load_clip(config.model, config.revision)
    visual = model.visual
    if not is_vit(visual) or visual.pool_type != "tok":
        raise ModelError(
            f"{config.model}: CLIP-RC needs a plain ViT whose class token is the image's "
            f"embedding, found {type(visual).__name__} with pooling "
            f"{getattr(visual, 'pool_type', None)!r}"
        )
    patch = cell_pixels(visual)
    if patch is None or any(side % patch for side in config.size_hw):
        raise ModelError(
            f"size_hw must be multiples of {config.model}'s patch of {patch} pixels, found "
            f"{config.size_hw}"
        )
    resize_positions(visual, (config.size_hw[0] // patch, config.size_hw[1] // patch))
    try:
        network = ClipRcNetwork(visual, config)
    except ValueError as error:
        raise ModelError(f"{config.model}: {error}") from error
    return network.to(device).eval(), Pixels.of_open_clip(model, device, torch.float32)
