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
    from ovref_inference.proposers.grounding import GroundingDino
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
    "CrfConfig", "GroundedSam", "GroundingDino", "GroundingDinoConfig", "MaskFormer",
    "MaskFormerConfig", "OpenCutConfig", "OpenCutProposerConfig", "Proposals", "Proposer",
    "ProposerConfig", "SamConfig", "SamGridConfig", "SamMasks", "as_proposals",
    "grounded_sam_proposer", "load_detector", "load_grounded_sam", "load_mask_former",
    "load_proposer", "load_sam", "mask_former_proposer", "no_proposals", "opencut_proposer",
    "sam_grid_proposer",
]  # fmt: skip

__getattr__ = lazy_exports(__name__, {
    "config": "CrfConfig GroundingDinoConfig MaskFormerConfig OpenCutConfig OpenCutProposerConfig "
              "ProposerConfig SamConfig SamGridConfig",
    "detectors": "load_detector",
    "grounded_sam": "GroundedSam load_grounded_sam",
    "grounding": "GroundingDino",
    "load": "Proposer grounded_sam_proposer load_proposer mask_former_proposer no_proposals "
            "opencut_proposer sam_grid_proposer",
    "mask_former": "MaskFormer load_mask_former",
    "proposals": "Proposals as_proposals",
    "sam": "SamMasks",
    "sam_model": "load_sam",
})  # fmt: skip
