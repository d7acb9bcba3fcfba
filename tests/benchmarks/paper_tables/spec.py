"""What the papers' tables are measured on and with."""

from dataclasses import dataclass, field

from ovref.config import STRICT
from ovref.evaluation import miniature
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.proposers.config import (
    FcClipConfig,
    GroundingDinoConfig,
    MaskFormerConfig,
    OpenCutProposerConfig,
    SamConfig,
    SamGridConfig,
)
from ovref_inference.segmenters.corrclip import CorrClipConfig
from ovref_inference.segmenters.fossil import FossilConfig
from ovref_inference.segmenters.freeda import FreedaConfig
from ovref_inference.segmenters.retclip import RetClipConfig
from ovref_inference.segmenters.vocseg import VocSegConfig


@dataclass(frozen=True, kw_only=True)
class Collections:
    """Folders or URLs of the collections; their own encoders are loaded."""

    __pydantic_config__ = STRICT

    fossil: str
    """From generated images, with a self-supervised backbone: FOSSIL, FreeDA, CorrCLIPv2."""
    vocseg_binary: str
    """From real images, of masked crops: VOCSeg, and its masking strategies."""
    vocseg_heatmap: str
    """The same regions, embedded with their background attenuated."""
    vocseg_none: str
    """The same regions, embedded with their background."""
    retclip: str
    """From real images, of dense CLIP features pooled over masks: RetCLIP."""


@dataclass(frozen=True, kw_only=True)
class Segmenters:
    """Where the search for parameters starts, or what is used if none is made."""

    __pydantic_config__ = STRICT

    fossil: FossilConfig = miniature.FOSSIL
    vocseg: VocSegConfig = field(default_factory=VocSegConfig)
    retclip: RetClipConfig = field(default_factory=RetClipConfig)
    corrclip: CorrClipConfig = field(default_factory=CorrClipConfig)
    freeda: FreedaConfig = field(default_factory=lambda: FreedaConfig(n=20, windows=None))

    def __post_init__(self) -> None:
        for name in ("fossil", "freeda"):
            if getattr(self, name).windows is not None:
                raise ValueError(f"{name}.windows must be null: scenes have the encoders' own size")


@dataclass(frozen=True, kw_only=True)
class Proposers:
    """The models behind the proposals; the thresholds are the miniature's."""

    __pydantic_config__ = STRICT

    opencut: OpenCutProposerConfig = miniature.OPENCUT
    mask_former: MaskFormerConfig = field(
        default_factory=lambda: MaskFormerConfig(model="miniature:maskformer")
    )
    sam_grid: SamGridConfig = field(
        default_factory=lambda: SamGridConfig(
            sam=SamConfig(model="miniature:sam"),
            points_per_side=8,
            min_predicted_iou=0.7,
            min_stability=0.6,
        )
    )
    detector: GroundingDinoConfig = field(
        default_factory=lambda: GroundingDinoConfig(
            model="miniature:grounding_dino", box_threshold=0.2, text_threshold=0.2
        )
    )
    sam: SamConfig = field(default_factory=lambda: SamConfig(model="miniature:sam"))
    """Turns the detector's boxes into masks."""
    fcclip: FcClipConfig | None = None
    """A trained FC-CLIP."""
    open_mask_former: MaskFormerConfig | None = None
    """A MaskFormer with open classes."""


@dataclass(frozen=True, kw_only=True)
class BuildFirst:
    """A build whose collection the tables need."""

    __pydantic_config__ = STRICT

    config: str
    """Settings of `ovref build`, in YAML."""
    overrides: tuple[str, ...] = ()
    """Settings over the file's, as `key=value`."""


@dataclass(frozen=True, kw_only=True)
class TablesSpec:
    """The papers' tables in small, on scenes of the miniature."""

    __pydantic_config__ = STRICT

    output: str
    """Folder for tables.md, tables.json, pictures and, in `parts`, what is done already."""
    collections: Collections
    """What the segmenters ask."""
    builds: tuple[BuildFirst, ...] = ()
    """Builds that are made first where their collections are missing."""
    scenes: int = 100
    """Test scenes that the tables are measured on."""
    tuning_scenes: int = 60
    """Validation scenes that parameters are chosen on; 0 takes `segmenters` as they are."""
    segmenters: Segmenters = field(default_factory=Segmenters)
    """Parameters."""
    proposers: Proposers = field(default_factory=Proposers)
    """Where masks come from."""
    clip: VisualEncoderConfig = miniature.CLIP
    """Dense CLIP features in the space of the collections' texts: text alone, CorrCLIPv2."""
    reasons: dict[str, str] = field(default_factory=dict)
    """What people found out: why an ordering, by its key, is not the paper's. Printed only then."""
    pictures: int = 5
    """Scenes drawn; 0 draws none."""

    def __post_init__(self) -> None:
        if self.scenes < 1:
            raise ValueError(f"scenes must be at least 1, found {self.scenes}")
        for name in ("tuning_scenes", "pictures"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
