"""Settings of the trainings by matched masks (`ovref.training.train_masks`)."""

from dataclasses import dataclass, field

from ovref.config import STRICT
from ovref.training.labelled_batches import TrainingData
from ovref.training.matching import MatchingLosses
from ovref.training.settings import TrainingConfig
from ovref_inference.proposers import fcclip
from ovref_inference.proposers.mask_decoder import MaskDecoderConfig
from ovref_inference.proposers.open_mask_former import OpenMaskFormerConfig
from ovref_inference.ranges import require_each_at_least, require_model, require_within

CONVNEXT_LARGE = MaskDecoderConfig(widths=(192, 384, 768, 1536), dim=768)
"""FC-CLIP's decoder of its best model."""


@dataclass(frozen=True, kw_only=True)
class FcClipNetwork:
    """A frozen convolutional CLIP and the decoder that is trained on its feature maps."""

    __pydantic_config__ = STRICT

    model: str = "convnext_large_d_320:laion2b_s29b_b131k_ft_soup"
    """An open_clip model with a ConvNeXt or ResNet: a folder, `hf-hub:<id>`, or
    `<architecture>:<tag>`. Its weights never change."""
    size_hw: tuple[int, int] = (1024, 1024)
    """Height and width in pixels of the crops; multiples of 32."""
    decoder: MaskDecoderConfig = CONVNEXT_LARGE
    """Sizes; `widths` and `dim` are those of the CLIP."""

    def __post_init__(self) -> None:
        require_model(self.model)
        _check_size(self.size_hw)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model of transformers whose weights a MaskFormer begins with."""

    __pydantic_config__ = STRICT

    model: str
    """A Swin (`microsoft/swin-base-patch4-window12-384-in22k`), for the backbone alone; or a
    MaskFormer (`facebook/maskformer-swin-base-coco`), for all but its classes. Hub id or folder."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""

    def __post_init__(self) -> None:
        require_model(self.model)


@dataclass(frozen=True, kw_only=True)
class MaskFormerNetwork:
    """A MaskFormer, trained whole, and the CLIP whose texts it learns to speak of."""

    __pydantic_config__ = STRICT

    model: str = "ViT-L-14:laion2b_s32b_b82k"
    """An open_clip model, whose text tower alone is used."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    size_hw: tuple[int, int] = (640, 640)
    """Height and width in pixels of the crops; multiples of 32."""
    sizes: OpenMaskFormerConfig = field(default_factory=OpenMaskFormerConfig)
    """Sizes of the network."""
    start: Start | None = None
    """What to begin with; null begins with random weights."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue, from 0 to 1; ImageNet's, as Swins are trained."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each."""
    short_side: int = 640
    """Short side that the trained model brings images to."""
    long_side: int = 2560
    """Their long side at most."""

    def __post_init__(self) -> None:
        require_model(self.model)
        _check_size(self.size_hw)
        require_within("short_side", self.short_side, 1, self.long_side)


def _check_size(size_hw: tuple[int, int]) -> None:
    require_each_at_least("size_hw", size_hw, 1)
    if any(side % 32 for side in size_hw):
        raise ValueError(f"size_hw must be multiples of 32, found {size_hw}")


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """What both trainings share."""

    __pydantic_config__ = STRICT

    output: str
    """Folder or URL for the trained model and its checkpoints, with which the same command
    resumes."""
    data: TrainingData
    """Images and labels; of a panoptic set each instance is a mask, of others each class."""
    templates: tuple[str, ...] = fcclip.TEMPLATES
    """What class names are put into, for their text embeddings, which are averaged."""
    training: TrainingConfig
    """The loop."""
    device: str | None = None
    """"cpu", "cuda", ...; null takes a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class FcClipTraining(MaskTraining):
    """Settings of `ovref train method=fcclip`."""

    __pydantic_config__ = STRICT

    network: FcClipNetwork = field(default_factory=FcClipNetwork)
    """The frozen CLIP and the trained decoder."""
    losses: MatchingLosses = field(default_factory=MatchingLosses)
    """Weights of the losses."""


@dataclass(frozen=True, kw_only=True)
class MaskFormerTraining(MaskTraining):
    """Settings of `ovref train method=mask_former`."""

    __pydantic_config__ = STRICT

    network: MaskFormerNetwork = field(default_factory=MaskFormerNetwork)
    """The network, and the CLIP of its texts."""
    losses: MatchingLosses = MatchingLosses(classes=1.0, masks=20.0, dice=1.0, points=0)  # noqa: RUF009
    """Weights of the losses; MaskFormer's."""
