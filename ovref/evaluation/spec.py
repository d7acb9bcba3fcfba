"""What `ovref evaluate` evaluates, on what, and how: plain data."""

from dataclasses import dataclass, field, replace
from typing import Literal

from ovref.config import STRICT
from ovref.errors import InputError
from ovref.evaluation import miniature
from ovref.evaluation.datasets import HELD_OUT, open_scenes, training_scenes
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.huggingface import open_any_set
from ovref.evaluation.named_sets.label_folder import LabelFolder, open_label_folder, seen_of
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.evaluation.protocols import Protocol, protocol_of, protocol_of_windows
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.proposers.config import OpenCutProposerConfig, ProposerConfig
from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.clip_rc import ClipRcConfig
from ovref_inference.segmenters.corrclip import CorrClipConfig
from ovref_inference.segmenters.fossil import FossilConfig
from ovref_inference.segmenters.freeda import FreedaConfig
from ovref_inference.segmenters.retclip import RetClipConfig
from ovref_inference.segmenters.vocseg import VocSegConfig

TITLES = {
    "fossil": "FOSSIL",
    "fossil_no_proposals": "FOSSIL without proposals",
    "fossil_oracle": "FOSSIL with oracle masks",
    "text_only": "text only",
    "text_only_opencut": "text only with OpenCut",
    "text_only_oracle": "text only with oracle masks",
    "freeda": "FreeDA",
    "vocseg": "VOCSeg",
    "retclip": "RetCLIP",
    "retclip_oracle": "RetCLIP with oracle masks",
    "corrclip": "CorrCLIPv2",
    "knn": "nearest patches",
    "clip_rc": "CLIP-RC",
}
"""Rows of the table and how people write them."""

CLIP_RC = ClipRcConfig(windows=None)
"""CLIP-RC's own settings without windows."""

FREEDA = FreedaConfig(windows=None)
"""FreeDA's own settings without windows."""

RowName = Literal[
    "fossil", "fossil_no_proposals", "fossil_oracle", "text_only", "text_only_opencut",
    "text_only_oracle", "freeda", "vocseg", "retclip", "retclip_oracle", "corrclip",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Nearest patches of training images (`ovref.evaluation.knn`)."""

    __pydantic_config__ = STRICT

    encoder: VisualEncoderConfig = miniature.OPENCUT.keys
    """The backbone, of dense features; it resizes images to its own size."""
    neighbours: int = 30
    """Remembered patches that a patch attends to."""
    temperature: float = 0.02
    """Cosines are divided by it before the softmax."""
    memory: int = 102_400
    """Patches that are remembered, as many of each training image. The published tables have
    1,024,000 and 10,240,000, for which a GPU should compare them."""
    images: int | None = None
    """The first so many training images; null takes all, of scenes of the miniature 400."""
    folder: LabelFolder | None = None
    """Training images beside `folder`; those of `dataset` are its split `train`."""
    seed: int = 0
    """Seed of the choice of patches."""

    def __post_init__(self) -> None:
        for name in ("neighbours", "memory", "images"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")
        if self.encoder.masking is not None:
            raise ValueError("encoder must give dense features, not masked crops")


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What is evaluated, on what, and which variations are tried."""

    __pydantic_config__ = STRICT

    method: Literal["collection", "knn", "clip_rc"] = "collection"
    """`knn` asks how good a backbone is, without any collection: each patch takes the classes of
    the nearest patches of training images. `clip_rc` is a trained head (`ovref train`). With both,
    `rows` and their settings do not matter."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Settings of `method=knn`."""
    clip_rc: ClipRcConfig = CLIP_RC
    """Settings of `method=clip_rc`; its `windows` must be null, for those of a protocol are slid.
    A protocol's own penalty of seen classes takes the place of its `seen_penalty`."""
    collection: str = ""
    """Folder or URL of the collection; its own encoders are loaded. Not for `method=knn`; for
    `method=clip_rc` only with `clip_rc.classes=prototypes`."""
    output: str
    """Folder for evaluation.json, evaluation.md, tables and pictures, and for what is counted image
    by image, with which the same command resumes; made if it is missing."""
    split: Literal["validation", "test"] = "test"
    """Held-out scenes: `validation` to choose parameters, `test` to report."""
    scenes: int = 200
    """Scenes evaluated."""
    dataset: str = ""
    """A set of the field by its name (`ade150`, `voc21`, ...), evaluated instead of scenes."""
    root: str = ""
    """Folder that holds `dataset`, as published, in a usual converted layout, or as a data set of
    Hugging Face's `datasets` with the columns `image` and `annotation`."""
    names: str = ""
    """Class list of `dataset`: `mmseg`, `fcclip`, `corrclip`, ... or the path of a text file; empty
    takes the protocol's."""
    protocol: str = ""
    """How images are resized and cut into windows and background is found: `tcl`, `corrclip`,
    `retclip`, `vocseg` or `zs3`; empty takes each image as it is, as a whole."""
    proposals: Literal["window", "image"] = "window"
    """Whether regions are proposed in each window of the protocol, or once in the resized image;
    the papers leave it open."""
    limit: int | None = None
    """The first so many images of `dataset` or `folder`; null takes all."""
    folder: LabelFolder | None = None
    """Images and label maps of your own, evaluated instead of scenes; `opencut.keys` and `clip`
    should then name models for them."""
    unseen: tuple[str, ...] = ()
    """Classes of scenes or of `dataset` whose masks trained models never saw, for hIoU; empty takes
    the set's own split."""
    rows: tuple[RowName, ...] = (
        "fossil", "fossil_no_proposals", "fossil_oracle",
        "text_only", "text_only_opencut", "text_only_oracle",
    )  # fmt: skip
    """What is compared; the report goes into the details of the first."""
    fossil: FossilConfig = miniature.FOSSIL
    """Configuration from which the ablations start; its `windows`, in place of a protocol, are slid
    for every row. N is far below the paper's, for a small collection has few dozen references of a
    class, and whatever is retrieved beyond them is of other classes."""
    freeda: FreedaConfig = FREEDA
    """FreeDA's settings; their `windows` must be null, for those of a protocol are slid."""
    vocseg: VocSegConfig = field(default_factory=VocSegConfig)
    """VOCSeg's settings."""
    retclip: RetClipConfig = field(default_factory=RetClipConfig)
    """RetCLIP's settings."""
    corrclip: CorrClipConfig = field(default_factory=CorrClipConfig)
    """CorrCLIPv2's settings."""
    opencut: OpenCutProposerConfig = miniature.OPENCUT
    """Proposals."""
    proposer: ProposerConfig | None = None
    """Proposals of `vocseg`, `retclip` and `corrclip`; null takes `opencut`."""
    clip: VisualEncoderConfig = miniature.CLIP
    """Dense CLIP features of the text-only baseline, in the space of the collection's texts."""
    ablate_n: tuple[int, ...] = (5, 10, 20, 40, 80, 150)
    """Retrieved references tried, everything else as in `fossil`."""
    ablate_k: tuple[int, ...] = (1, 3, 5, 10, 20)
    """Prototypes tried."""
    ablate_gamma: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Weights of the best prototype tried."""
    boundaries: bool = False
    """Whether boundary IoU is measured too, which takes some 10 ms a class, image and row."""
    pictures: int = 6
    """Images drawn in predictions.png, and in worst.png; 0 draws none."""
    shard_size: int = 32
    """Images of a shard, the unit of work and of commit: what a kill can cost at most."""
    batch_size: int = 8
    """Images whose windows are encoded together and held in memory; another number may change last
    bits of features."""
    features: str = ""
    """Folder that keeps features and proposals from one evaluation to the next, for those that
    change only N, K, gamma, thresholds or rows; empty keeps none. On ADE20k at FOSSIL's settings it
    takes some 60 MB an image."""

    def __post_init__(self) -> None:
        needed = self.method == "collection" or (
            self.method == "clip_rc" and self.clip_rc.classes == "prototypes"
        )
        if bool(self.collection) != needed:
            raise ValueError(
                "name the collection that is evaluated" if needed
                else f"method={self.method} has no collection: leave it out"
            )  # fmt: skip
        if bool(self.clip_rc.weights) != (self.method == "clip_rc"):
            raise ValueError("give clip_rc.weights with method=clip_rc, and with no other")
        if self.unseen and self.folder:
            raise ValueError("unseen is for scenes and dataset; folder has its own")
        if self.method == "knn" and (self.protocol or self.fossil.windows is not None):
            raise ValueError("method=knn takes images as they are: leave out protocol and windows")
        if bool(self.folder) != bool(self.knn.folder) and self.method == "knn":
            raise ValueError("method=knn on a folder needs knn.folder, its training images, too")
        if self.split not in HELD_OUT:
            raise ValueError(f"split must be one of {HELD_OUT}, found {self.split!r}")
        require_at_least("scenes", self.scenes, 1)
        if bool(self.dataset) != bool(self.root) or (self.dataset and self.folder):
            raise ValueError("give dataset with root, or folder, or neither")
        if not self.rows or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows must name one or more rows, each once, found {self.rows}")
        if self.protocol and self.fossil.windows is not None:
            raise ValueError("give protocol or fossil.windows, not both: windows would slide twice")
        if self.freeda.windows is not None:
            raise ValueError("freeda.windows must be null; protocol or fossil.windows slides some")
        if self.clip_rc.windows is not None:
            raise ValueError("clip_rc.windows must be null; protocol or fossil.windows slides some")
        self.chosen_protocol()
        require_at_least("pictures", self.pictures, 0)
        for name in ("limit", "shard_size", "batch_size"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)

    def chosen_protocol(self) -> Protocol | None:
        """The protocol, with its settings for `dataset`; None takes images as they are.

        Raises:
            ConfigError: there is no protocol of that name.
        """
        if self.fossil.windows is not None:
            return replace(protocol_of_windows(self.fossil.windows), proposals=self.proposals)
        if not self.protocol:
            return None
        return replace(protocol_of(self.protocol, self.dataset), proposals=self.proposals)

    def open_training(self) -> LabelledSet:
        """The training images of `method=knn`; nothing of them is read yet. Raises as
        `open_data`."""
        if self.knn.folder:
            return open_label_folder(self.knn.folder).first(self.knn.images)
        if not self.dataset:
            return training_scenes(self.knn.images or 400)
        found = open_any_set(self.dataset, self.root, "train", self.names)
        return found.first(self.knn.images)

    def open_data(self) -> LabelledSet:
        """The data set; nothing of it is read yet.

        Raises:
            InputError: it is not there, or not as it should be.
        """
        data = self._open()
        if not self.unseen:
            return data
        try:
            return replace(data, seen=seen_of(data.class_names, self.unseen))
        except ValueError as error:
            raise InputError(f"{data.name}: {error}") from error

    def _open(self) -> LabelledSet:
        if self.folder:
            return open_label_folder(self.folder).first(self.limit)
        if not self.dataset:
            return open_scenes(self.split, self.scenes)
        names, protocol = self.names, self.chosen_protocol()
        if not names and protocol is not None:
            known = SETS[self.dataset].lists if self.dataset in SETS else ()
            names = protocol.names if protocol.names in known else ""
        return open_any_set(self.dataset, self.root, names=names).first(self.limit)
