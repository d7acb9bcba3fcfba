"""FC-CLIP (Yu et al., NeurIPS 2023) as a proposer: one frozen CLIP for masks and for their classes.

RetCLIP's setting across data sets (section 2.2): the feature maps of a convolutional CLIP go
through a trained mask decoder, whose queries give masks, embeddings that are compared with any
texts (the in-vocabulary classifier), and, pooled from the last of the same maps, what is classified
by CLIP and searches the collection. A model is a folder, which `ovref train` or `ovref convert
fcclip` writes:

    fcclip.json             which CLIP, the sizes of the decoder, the classes it was trained on
    decoder.safetensors     the weights of `mask_decoder.MaskDecoder`
    clip/                   the CLIP in open_clip's layout, unless `clip` names another one
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate, pad

from ovref_inference.encoders import clip_towers, cnn_towers
from ovref_inference.errors import ModelError
from ovref_inference.images import check_image
from ovref_inference.models import canonical, model_errors, resolve
from ovref_inference.pixels import Pixels, device_of
from ovref_inference.proposers.config import FcClipConfig
from ovref_inference.proposers.mask_decoder import MaskDecoder, MaskDecoderConfig
from ovref_inference.proposers.mask_former import image_probabilities
from ovref_inference.proposers.proposals import OpenClasses, Proposals

FORMAT = 1
SETTINGS, WEIGHTS, CLIP = "fcclip.json", "decoder.safetensors", "clip"
"""Files of a model's folder."""

TEMPLATES = (
    "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene",
    "There is the {} in the scene", "a photo of a {} in the scene", "a photo of a small {}.",
    "a photo of a medium {}.", "a photo of a large {}.", "This is a photo of a small {}.",
    "This is a photo of a medium {}.", "This is a photo of a large {}.",
    "There is a small {} in the scene.", "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)  # fmt: skip
"""ViLD's, with which FC-CLIP's released models were trained."""


@dataclass(frozen=True, kw_only=True)
class FcClipSettings:
    """What `fcclip.json` holds beside the format's version."""

    clip: str
    """Id of an open_clip model, or the name of a folder beside the file."""
    decoder: MaskDecoderConfig
    trained_names: tuple[str, ...]
    """Names of the classes that it was trained on, synonyms included."""
    templates: tuple[str, ...] = TEMPLATES
    training: Mapping[str, Any] | None = None
    """Steps, data and settings, for people; None of a converted model."""


class FcClip:
    """Proposals with open classes and features. Made by `load_fcclip`."""

    def __init__(
        self,
        visual: Any,
        decoder: MaskDecoder,
        images: Pixels,
        config: FcClipConfig,
        settings: FcClipSettings,
        *,
        clip: str,
    ) -> None:
        """
        Args:
            visual: a tower of `cnn_towers`, in evaluation mode on the device of `images`.
            decoder: of the tower's widths, likewise.
            images: the CLIP's preprocessing.
            clip: id of the CLIP, by which a collection of the same is known.
        """
        self._visual, self._decoder, self._images = visual, decoder, images
        self._config, self._settings, self._clip = config, settings, clip

    @torch.inference_mode()
    def propose(self, images: Sequence[np.ndarray]) -> list[Proposals]:
        """The masks of each image, one image at a time.

        Args:
            images: (H, W, 3) uint8 RGB, of any sizes.

        Returns:
            Proposals at the image's size, of the queries whose mask has a pixel at the decoder's
            resolution; a photograph of a megapixel takes 4 MB for each.
        """
        found = []
        for image_hwc in images:
            check_image(image_hwc)
            found.append(self._of(image_hwc))
        return found

    def _of(self, image_hwc: np.ndarray) -> Proposals:
        height, width = image_hwc.shape[:2]
        config = self._config
        scale = min(config.short_side / min(height, width), config.long_side / max(height, width))
        inner_hw = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = self._images([image_hwc], inner_hw)
        # Padded with zeros after normalisation, as the models were trained.
        pixels = pad(pixels, (0, -inner_hw[1] % 32, 0, -inner_hw[0] % 32))
        maps = cnn_towers.pyramid(self._visual, pixels)
        (decoded,) = self._decoder(maps, every=False)
        shown = (decoded.masks_bqhw[0] > 0).any(2).any(1)
        masks_qhw = decoded.masks_bqhw[0][shown]
        embeddings_qd = decoded.embeddings_bqd[0][shown]
        mask_probs_nhw = image_probabilities(
            masks_qhw, pixels.shape[2:], inner_hw, (height, width)
        )
        features_nd = region_embeddings(self._visual, maps[-1][0], masks_qhw)
        return Proposals(
            mask_probs_nhw=mask_probs_nhw,
            trained_names=self._settings.trained_names,
            open_classes=OpenClasses(
                embeddings_nd=embeddings_qd.float().cpu().numpy(),
                void_d=self._decoder.void[0].float().cpu().numpy(),
                scale=float(self._decoder.scale),
                templates=self._settings.templates,
            ),
            features_nd=features_nd.float().cpu().numpy(),
            features_of=self._clip,
        )


def region_embeddings(visual: Any, map_chw: torch.Tensor, masks_qhw: torch.Tensor) -> torch.Tensor:
    """Embeddings of masks in CLIP's joint space, pooled from its last feature map (FC-CLIP).

    A cell belongs to a mask whose logit, interpolated bilinearly, is above 0 there. A mask that
    reaches no cell has the one of its highest logit; FC-CLIP pools nothing then.

    Args:
        visual: a tower of `cnn_towers`.
        map_chw: the last of its `pyramid`.
        masks_qhw: logits.

    Returns:
        (q, d), not normalised.
    """
    grid_hw = (map_chw.shape[1], map_chw.shape[2])
    if not len(masks_qhw):
        masks_qhw = masks_qhw.new_zeros((0, *grid_hw))
    else:
        masks_qhw = interpolate(masks_qhw[None], size=grid_hw, mode="bilinear")[0]
    logits_ql = masks_qhw.flatten(1)
    inside_ql = logits_ql > 0
    best_ql = logits_ql == logits_ql.amax(1, keepdim=True)
    inside_ql = torch.where(inside_ql.any(1, keepdim=True), inside_ql, best_ql).to(map_chw)
    if cnn_towers.is_resnet(visual):
        positions_lc = cnn_towers.cell_positions(visual.attnpool, grid_hw).to(map_chw)
        cells_lc = map_chw.flatten(1).T + positions_lc
        return cnn_towers.attention_pooled(visual.attnpool, cells_lc, inside_ql, positions_lc)
    pooled_qc = inside_ql @ map_chw.flatten(1).T / inside_ql.sum(1, keepdim=True)
    return cnn_towers.trunk_head(visual)(pooled_qc)


def load_fcclip(config: FcClipConfig, *, device: str | None = None) -> FcClip:
    """Loads a model's folder and tries it on one image.

    Args:
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    Raises:
        ModelError: there is no such folder; its files are of another format, another CLIP or
            other sizes; or its CLIP has no convolutional tower.
    """
    folder = Path(resolve(config.model)).expanduser()
    settings = read_settings(folder)
    clip_id = settings.clip
    if (folder / clip_id).is_dir():
        clip_id = str(folder / clip_id)
    where = device_of(device)
    model, _ = clip_towers.load_clip(clip_id, "")
    visual = convolutional(model, clip_id)
    found = tuple(cnn_towers.widths(visual)), cnn_towers.joint_width(visual)
    wanted = settings.decoder.widths, settings.decoder.dim
    if found != wanted:
        raise ModelError(
            f"{folder} was trained with another CLIP: its maps are {wanted[0]} wide and its joint "
            f"space {wanted[1]}, those of {clip_id} {found[0]} and {found[1]}"
        )
    with model_errors(f"load FC-CLIP from {folder}"):
        decoder = MaskDecoder(settings.decoder)
        decoder.load_state_dict(load_file(folder / WEIGHTS))
        images = replace(Pixels.of_open_clip(model, where, torch.float32), mode="bilinear")
    proposer = FcClip(
        visual.to(where).eval(), decoder.to(where).eval(), images, config, settings,
        clip=canonical(clip_id),
    )  # fmt: skip
    with model_errors(f"use FC-CLIP from {folder}"):
        proposer.propose([np.zeros((64, 64, 3), dtype=np.uint8)])
    return proposer


def convolutional(model: Any, clip_id: str) -> Any:
    """The image tower of a CLIP. Raises ModelError if it is no ConvNeXt or ResNet."""
    visual = model.visual
    if not (cnn_towers.is_convnext(visual) or cnn_towers.is_resnet(visual)):
        raise ModelError(
            f"{clip_id} has no ConvNeXt or ResNet image tower, found {type(visual).__name__}: "
            "FC-CLIP's decoder needs the feature maps of one"
        )
    return visual


def read_settings(folder: Path) -> FcClipSettings:
    """Reads `fcclip.json`.

    Raises:
        ModelError: it is missing, damaged or of another format.
    """
    path = folder / SETTINGS
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        decoder = fields.pop("decoder")
        decoder["widths"] = tuple(decoder["widths"])
        settings = FcClipSettings(
            decoder=MaskDecoderConfig(**decoder),
            trained_names=tuple(fields.pop("trained_names")),
            templates=tuple(fields.pop("templates")),
            **fields,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"cannot read {path}: {error!r}; `ovref convert fcclip` and `ovref train` "
            "write such a folder"
        ) from error
    return settings
