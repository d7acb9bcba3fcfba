"""Settings of detectors and proposers: importable without torch, for specs and manifests."""

from dataclasses import dataclass, field
from typing import Literal

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.ranges import (
    ADDED_LATER,
    STRICT,
    require_above,
    require_at_least,
    require_model,
    require_one_of,
    require_within,
)


@dataclass(frozen=True, kw_only=True)
class GroundingDinoConfig:
    """A detector of named things and which of its boxes are kept; GroundingDINO's published
    thresholds. MM-Grounding-DINO, LLMDet and OWLv2 can take its place."""

    __pydantic_config__ = STRICT

    model: str
    """`miniature:grounding_dino`, a Hugging Face id (`IDEA-Research/grounding-dino-base`,
    `google/owlv2-base-patch16-ensemble`), or a folder of transformers' layout."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    box_threshold: float = 0.35
    """A box is kept if its most probable token is above this; of OWLv2, if its noun's probability
    is (its authors' demonstration has 0.1)."""
    text_threshold: float = 0.25
    """And if the mean probability of its noun's tokens is above this; of no use to OWLv2."""
    nms_iou: float = 0.7
    """If two boxes of one noun have a higher IoU, the one with the lower score is dropped."""
    template: str = field(default="a photo of a {}", metadata=ADDED_LATER)
    """What OWLv2 is asked for a noun, with one `{}`; the others are asked for the noun alone."""

    def __post_init__(self) -> None:
        require_model(self.model)
        if self.template.count("{}") != 1:
            raise ValueError(f"template must have one {{}}, found {self.template!r}")
        for name in ("box_threshold", "text_threshold", "nms_iou"):
            require_within(name, getattr(self, name), 0, 1)


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """A Segment Anything model and how it is prompted with boxes."""

    __pydantic_config__ = STRICT

    model: str
    """`miniature:sam`, a published `.pth` checkpoint of segment-anything (or the same tensors as
    `.safetensors`), or a folder or Hugging Face id of transformers' SAM, SAM 2 (`facebook/
    sam2.1-hiera-large`), SAM-HQ or EdgeTAM."""
    revision: str = field(default="", metadata=ADDED_LATER)
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    multimask: bool = False
    """False: the decoder's single mask, which its authors recommend for unambiguous prompts such as
    boxes. True: the one of its three masks with the highest predicted IoU."""

    def __post_init__(self) -> None:
        require_model(self.model)


@dataclass(frozen=True, kw_only=True)
class SamGridConfig:
    """Masks of Segment Anything for a grid of points; the defaults are segment-anything's for
    ViT-H."""

    __pydantic_config__ = STRICT

    sam: SamConfig
    """The model; each point always gives three masks."""
    points_per_side: int = 32
    """Points along each side of the grid."""
    min_predicted_iou: float = 0.88
    """Masks with a lower predicted IoU are dropped."""
    min_stability: float = 0.95
    """Minimum stability: IoU of the mask at a higher and at a lower threshold."""
    nms_iou: float = 0.7
    """If the boxes of two masks have a higher IoU, the mask with the lower predicted IoU is
    dropped."""
    exclusive: bool = field(default=True, metadata=ADDED_LATER)
    """Whether a pixel belongs only to the mask with the highest predicted IoU."""

    def __post_init__(self) -> None:
        require_at_least("points_per_side", self.points_per_side, 1)
        for name in ("min_predicted_iou", "min_stability", "nms_iou"):
            require_within(name, getattr(self, name), 0, 1)


@dataclass(frozen=True, kw_only=True)
class MaskFormerConfig:
    """A MaskFormer or Mask2Former, whose classes are not used."""

    __pydantic_config__ = STRICT

    model: str
    """`miniature:maskformer`, a Hugging Face id (`facebook/maskformer-swin-base-coco`), or a folder
    of transformers' layout."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    min_score: float = 0.5
    """Queries whose probability of showing an object is not above this are dropped."""
    mask_threshold: float = 0.4
    """A pixel belongs to a query's mask if its probability is at least this (VOCSeg section 4;
    MaskFormer's own panoptic inference has 0.5)."""
    min_kept: float = 0.8
    """Masks that keep at most this share of their pixels, because masks with higher scores have the
    others, are dropped."""
    exclusive: bool = field(default=True, metadata=ADDED_LATER)
    """Whether a pixel belongs only to the query with the highest score. False: each query has every
    pixel above the threshold, so masks overlap as in VOCSeg (section 3.2), and `min_kept` is
    unused."""

    def __post_init__(self) -> None:
        require_model(self.model)
        for name in ("min_score", "min_kept"):
            require_within(name, getattr(self, name), 0, 1, "[)")
        require_within("mask_threshold", self.mask_threshold, 0, 1, "()")


@dataclass(frozen=True, kw_only=True)
class FcClipConfig:
    """FC-CLIP, for segmenters of regions: masks, embeddings compared with texts, and features."""

    __pydantic_config__ = STRICT

    model: str
    """A folder that `ovref convert fcclip` has written."""
    short_side: int = 800
    """Images are resized to this short side, in pixels, aspect ratio kept (1024 for Cityscapes)."""
    long_side: int = 1333
    """Images whose long side would be above this are resized to this long side instead (2560)."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must name a folder, found an empty string")
        require_within("short_side", self.short_side, 1, self.long_side)


@dataclass(frozen=True, kw_only=True)
class OpenCutConfig:
    """Thresholds of the cuts, and refinement of their masks (FOSSIL section 3.4)."""

    __pydantic_config__ = STRICT

    taus: tuple[float, ...] = (0.15, 0.2, 0.3, 0.0, -0.1, 0.8)
    """Similarity thresholds in (-1, 1), in order. The paper gives no list; this one starts at
    MaskCut's values for objects and ends with negative and large values, which, it says, find
    background. The best list depends on the backbone: tune it on validation images."""
    stages: int = 3
    """Maximum number of masks per threshold (the paper's t)."""
    foreground: Literal["peak", "smaller"] = "peak"
    """Which side of a cut becomes the mask: `peak`, the one with the eigenvector's largest absolute
    value (FOSSIL, MaskCut); `smaller`, the one with fewer patches, or the peak's if they are equal.
    The peak's side may hold several parts of the image at once, the smaller one rarely does."""
    eta: float = 16.0
    """Connected components smaller than this are dropped. In patches of the paper's 60 x 60 grid,
    so 16 is 0.44 % of the image; on another grid it is scaled by area. 0 keeps everything."""
    eta_unit: Literal["patches", "pixels"] = field(default="patches", metadata=ADDED_LATER)
    """`pixels`: of the paper's 480 x 480 image, taken literally; 16 of them are a quarter of a
    patch, so this only affects masks finer than patches (`OpenCutProposerConfig.crf_at`)."""
    mu: float = 0.8
    """A component is merged with an earlier mask if their intersection over union is above this."""
    rho: float = 0.7
    """A component is dropped if more than this share of it lies in earlier masks."""

    def __post_init__(self) -> None:
        require_one_of("eta_unit", self.eta_unit, "patches", "pixels")
        if not self.taus:
            raise ValueError("taus must name at least one threshold, found none")
        for tau in self.taus:
            require_within("taus", tau, -1, 1, "()")
        require_at_least("stages", self.stages, 1)
        require_at_least("eta", self.eta, 0)
        for name in ("mu", "rho"):
            require_within(name, getattr(self, name), 0, 1, "[)")


@dataclass(frozen=True, kw_only=True)
class CrfConfig:
    """The fully connected CRF that aligns masks with edges in the image (FOSSIL section 4.1); the
    defaults are MaskCut's. Distances are in pixels of an image whose shorter side has 480, and
    scaled with the image."""

    __pydantic_config__ = STRICT

    appearance_weight: float = 10.0
    """Weight of the kernel for pixels that are near and of similar colour."""
    appearance_distance: float = 50.0
    """Standard deviation of their distance."""
    appearance_colour: float = 5.0
    """Standard deviation of their difference in each colour channel, out of 255."""
    smoothness_weight: float = 7.0
    """Weight of the kernel for pixels that are near, of any colour; 0 disables it."""
    smoothness_distance: float = 3.0
    """Standard deviation of their distance."""
    steps: int = 10
    """Steps of mean-field inference."""

    def __post_init__(self) -> None:
        for name in ("appearance_distance", "appearance_colour", "smoothness_distance"):
            require_above(name, getattr(self, name), 0)
        for name in ("appearance_weight", "smoothness_weight"):
            require_at_least(name, getattr(self, name), 0)
        require_at_least("steps", self.steps, 1)


@dataclass(frozen=True, kw_only=True)
class OpenCutProposerConfig:
    """OpenCut and its backbone."""

    __pydantic_config__ = STRICT

    keys: VisualEncoderConfig
    """The backbone, with `features="keys"` and 480 pixels in FOSSIL."""
    cut: OpenCutConfig = field(default_factory=OpenCutConfig)
    """Settings of the cuts."""
    crf: CrfConfig | None = field(default_factory=CrfConfig)
    """How masks are aligned with edges in the image; null leaves them on the patch grid."""
    crf_at: Literal["masks", "cuts"] = field(default="masks", metadata=ADDED_LATER)
    """`masks`: one CRF for all masks of an image, at the end. `cuts`: one CRF per cut, before the
    cuts are refined into masks, as in MaskCut; slower."""

    def __post_init__(self) -> None:
        require_one_of("crf_at", self.crf_at, "masks", "cuts")
        if self.keys.aspect != "stretched":
            raise ValueError("keys must be of images brought to one size: aspect stretched")
        if self.crf_at == "cuts" and self.crf is None:
            raise ValueError("crf_at cuts needs a crf, found none")


@dataclass(frozen=True, kw_only=True)
class GroundedSamConfig:
    """GroundingDINO prompted with all classes, and SAM's masks of its boxes (RetCLIP section
    2.2)."""

    __pydantic_config__ = STRICT

    detector: GroundingDinoConfig
    """Finds boxes of the class names."""
    sam: SamConfig
    """Turns boxes into masks."""
    exclusive: bool = True
    """Whether a pixel belongs only to the box with the highest score. False: masks stay as SAM
    predicts them and may overlap."""


@dataclass(frozen=True, kw_only=True)
class ProposerConfig:
    """A class-agnostic proposer: exactly one of these."""

    __pydantic_config__ = STRICT

    mask_former: MaskFormerConfig | None = None
    sam_grid: SamGridConfig | None = None
    opencut: OpenCutProposerConfig | None = None
    grounded_sam: GroundedSamConfig | None = field(default=None, metadata=ADDED_LATER)
    """For evaluations only: it needs class names, which a build does not have; the counterpart
    there is `ground.detector`."""

    fcclip: FcClipConfig | None = field(default=None, metadata=ADDED_LATER)
    """For evaluations: it says of any class what a region shows, which a build does not ask."""

    def __post_init__(self) -> None:
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"name one proposer of {', '.join(self.__dataclass_fields__)}, found "
                f"{' and '.join(given) or 'none'}"
            )

    @property
    def name(self) -> str:
        """The name of the proposer that is set."""
        return next(name for name in self.__dataclass_fields__ if getattr(self, name) is not None)
