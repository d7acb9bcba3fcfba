"""Proposers: images -> class-agnostic masks.

Importing this package is light; the names below that load or run models import torch and their
libraries when they are first used.
"""

from typing import TYPE_CHECKING

from ovref_inference.lazy import lazy_exports

if TYPE_CHECKING:
    from ovref_inference.proposers.config import (
        CrfConfig,
        GroundingDinoConfig,
        MaskFormerConfig,
        OpenCutConfig,
        OpenCutProposerConfig,
        ProposerConfig,
        SamConfig,
        SamGridConfig,
    )
    from ovref_inference.proposers.detectors import load_detector
    from ovref_inference.proposers.grounded_sam import GroundedSam, load_grounded_sam
    from ovref_inference.proposers.grounding import GroundingDino, load_grounding_dino
    from ovref_inference.proposers.load import (
        Proposer,
        grounded_sam_proposer,
        load_proposer,
        mask_former_proposer,
        no_proposals,
        opencut_proposer,
        sam_grid_proposer,
    )
    from ovref_inference.proposers.mask_former import MaskFormer, load_mask_former
    from ovref_inference.proposers.proposals import Proposals, as_proposals
    from ovref_inference.proposers.sam import SamMasks
    from ovref_inference.proposers.sam_model import load_sam

__all__ = [
    "CrfConfig",
    "GroundedSam",
    "GroundingDino",
    "GroundingDinoConfig",
    "MaskFormer",
    "MaskFormerConfig",
    "OpenCutConfig",
    "OpenCutProposerConfig",
    "Proposals",
    "Proposer",
    "ProposerConfig",
    "SamConfig",
    "SamGridConfig",
    "SamMasks",
    "as_proposals",
    "grounded_sam_proposer",
    "load_detector",
    "load_grounded_sam",
    "load_grounding_dino",
    "load_mask_former",
    "load_proposer",
    "load_sam",
    "mask_former_proposer",
    "no_proposals",
    "opencut_proposer",
    "sam_grid_proposer",
]

_MODULES = {
    "CrfConfig": "config",
    "GroundedSam": "grounded_sam",
    "GroundingDino": "grounding",
    "GroundingDinoConfig": "config",
    "MaskFormer": "mask_former",
    "MaskFormerConfig": "config",
    "OpenCutConfig": "config",
    "OpenCutProposerConfig": "config",
    "Proposals": "proposals",
    "Proposer": "load",
    "ProposerConfig": "config",
    "SamConfig": "config",
    "SamGridConfig": "config",
    "SamMasks": "sam",
    "as_proposals": "proposals",
    "grounded_sam_proposer": "load",
    "load_detector": "detectors",
    "load_grounded_sam": "grounded_sam",
    "load_grounding_dino": "grounding",
    "load_mask_former": "mask_former",
    "load_proposer": "load",
    "load_sam": "sam_model",
    "mask_former_proposer": "load",
    "no_proposals": "load",
    "opencut_proposer": "load",
    "sam_grid_proposer": "load",
}

__getattr__ = lazy_exports(__name__, _MODULES)
