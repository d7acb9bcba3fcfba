"""Settings of `ovref evaluate`."""

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
from ovref.identity import ADDED_LATER
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.proposers.config import OpenCutProposerConfig, ProposerConfig
from ovref_inference.ranges import require_above, require_at_least
from ovref_inference.segmenters.clip_rc import ClipRcConfig
from ovref_inference.segmenters.corrclip import CorrClipConfig
from ovref_inference.segmenters.fossil import FossilConfig
from ovref_inference.segmenters.freeda import FreedaConfig
from ovref_inference.segmenters.retclip import RetClipConfig
from ovref_inference.segmenters.rns import RnsConfig
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
    "rns": "RNS",
    "rns_no_proposals": "RNS without proposals",
    "knn": "nearest patches",
    "clip_rc": "CLIP-RC",
}
"""Rows of the table -> titles."""

CLIP_RC = ClipRcConfig(windows=None)
"""CLIP-RC's own settings without windows."""

FREEDA = FreedaConfig(windows=None)
"""FreeDA's own settings without windows."""

RNS = RnsConfig(windows=None)
"""RNS's own settings without windows."""

RowName = Literal[
    "fossil", "fossil_no_proposals", "fossil_oracle", "text_only", "text_only_opencut",
    "text_only_oracle", "freeda", "vocseg", "retclip", "retclip_oracle", "corrclip",
    "rns", "rns_no_proposals",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Nearest patches of training images (`ovref.evaluation.knn`)."""

    __pydantic_config__ = STRICT

    encoder: VisualEncoderConfig = miniature.OPENCUT.keys
    """The backbone, with dense features; images are resized to its input size."""
    neighbours: int = 30
    """Number of nearest patches in the memory bank that a patch attends to."""
    temperature: float = 0.02
    """Temperature of the softmax over cosines."""
    memory: int = 102_400
    """Patches in the memory bank, equally many per training image. The published tables use
    1,024,000 and 10,240,000, which need a GPU."""
    images: int | None = None
    """Number of training images, from the first on; null takes all, or 400 scenes of the
    miniature."""
    folder: LabelFolder | None = None
    """Training images for `folder`; those of `dataset` are its split `train`."""
    seed: int = 0
    """Seed for sampling patches."""

    def __post_init__(self) -> None:
        for name in ("neighbours", "memory", "images"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_above("temperature", self.temperature, 0)
        if self.encoder.masking is not None:
            raise ValueError("encoder must have dense features, not masked crops")


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """Settings of an evaluation: collection, data, methods and ablations."""

    __pydantic_config__ = STRICT

    method: Literal["collection", "knn", "clip_rc"] = "collection"
    """`knn` evaluates a backbone without a collection: each patch gets the classes of the nearest
    patches of training images. `clip_rc` evaluates a trained head (`ovref train`). For both, `rows`
    and their settings do not matter."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Settings of `method=knn`."""
    clip_rc: ClipRcConfig = field(default=CLIP_RC, metadata=ADDED_LATER)
    """Settings of `method=clip_rc`; its `windows` must be null, for those of a protocol are slid.
    A protocol's own penalty of seen classes takes the place of its `seen_penalty`, but for 0, which
    takes nothing off."""
    collection: str = ""
    """Folder or URL of the collection, which names its encoders. Not for `method=knn`; for
    `method=clip_rc` only with `clip_rc.classes=prototypes`."""
    fallback: str = field(default="", metadata=ADDED_LATER)
    """Folder or URL of a collection of the same encoders, from which RetCLIP takes references of
    classes that `collection` lacks; empty for none."""
    output: str
    """Folder for evaluation.json, evaluation.md, tables and pictures, and for the counts of images,
    from which the same command resumes; created if missing."""
    split: Literal["validation", "test"] = "test"
    """Held-out scenes: `validation` to choose parameters, `test` to report."""
    scenes: int = 200
    """Number of scenes."""
    dataset: str = ""
    """Name of a published data set (`ade150`, `voc21`, ...), evaluated instead of scenes."""
    root: str = ""
    """Folder that contains `dataset`: as published, in a common converted layout, or as a data set
    of Hugging Face's `datasets` with the columns `image` and `annotation`."""
    names: str = ""
    """Class list of `dataset`: `mmseg`, `fcclip`, `corrclip`, ... or the path of a text file; empty
    takes that of the protocol."""
    protocol: str = ""
    """How images are resized and cut into windows, and how background is found: `tcl`, `corrclip`,
    `retclip`, `vocseg` or `zs3`; empty uses whole images at their own size."""
    proposals: Literal["window", "image"] = "window"
    """Whether regions are proposed in each window of the protocol, or once in the resized image;
    the papers do not say."""
    limit: int | None = None
    """Number of images of `dataset` or `folder`, from the first on; null takes all."""
    folder: LabelFolder | None = None
    """Your own images and label maps, evaluated instead of scenes; `opencut.keys` and `clip` should
    then be models for such images."""
    unseen: tuple[str, ...] = field(default=(), metadata=ADDED_LATER)
    """Classes of scenes or of `dataset` whose masks trained models never saw, for hIoU; empty takes
    the set's own split."""
    rows: tuple[RowName, ...] = (
        "fossil", "fossil_no_proposals", "fossil_oracle",
        "text_only", "text_only_opencut", "text_only_oracle",
    )  # fmt: skip
    """The compared methods; the report has details of the first."""
    fossil: FossilConfig = miniature.FOSSIL
    """Configuration from which the ablations start; without a protocol, its `windows` apply to
    every row. N is far below the paper's, because a small collection has only a few dozen
    references per class, and anything retrieved beyond them belongs to other classes."""
    freeda: FreedaConfig = FREEDA
    """FreeDA's settings; `windows` must be null, because those of the protocol apply."""
    vocseg: VocSegConfig = field(default_factory=VocSegConfig)
    """VOCSeg's settings."""
    retclip: RetClipConfig = field(default_factory=RetClipConfig)
    """RetCLIP's settings."""
    corrclip: CorrClipConfig = field(default_factory=CorrClipConfig)
    """CorrCLIPv2's settings."""
    rns: RnsConfig = field(default=RNS, metadata=ADDED_LATER)
    """RNS's settings; their `windows` must be null, as of `freeda`."""
    opencut: OpenCutProposerConfig = miniature.OPENCUT
    """Settings of OpenCut, the default proposer."""
    proposer: ProposerConfig | None = None
    """Proposals of `vocseg`, `retclip`, `corrclip` and `rns`; null takes `opencut`."""
    clip: VisualEncoderConfig = miniature.CLIP
    """Dense CLIP features of the text-only baseline, in the space of the text encoder."""
    ablate_n: tuple[int, ...] = (5, 10, 20, 40, 80, 150)
    """Ablation: numbers of retrieved references, everything else as in `fossil`."""
    ablate_k: tuple[int, ...] = (1, 3, 5, 10, 20)
    """Ablation: numbers of prototypes."""
    ablate_gamma: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Ablation: weights of the best prototype."""
    boundaries: bool = False
    """Whether to measure boundary IoU, which takes about 10 ms per class, image and row."""
    pictures: int = 6
    """Number of images drawn in predictions.png, and in worst.png; 0 draws none."""
    shard_size: int = 32
    """Images per shard, the unit of work and of commit: the most that a kill can cost."""
    batch_size: int = 8
    """Images whose windows are held in memory together and encoded in passes of up to 32, on a CPU
    of at most half a million pixels; another number may change the last bits of features."""
    features: str = ""
    """Folder that keeps features and proposals between evaluations that change only N, K, gamma,
    thresholds or rows; empty keeps none. On ADE20k with FOSSIL's settings it takes about 60 MB per
    image."""

    def __post_init__(self) -> None:
        needed = self.method == "collection" or (
            self.method == "clip_rc" and self.clip_rc.classes == "prototypes"
        )
        if bool(self.collection) != needed:
            raise ValueError(
                "name the collection to evaluate" if needed
                else f"method={self.method} has no collection: leave it out"
            )  # fmt: skip
        retclip = self.method == "collection" and {"retclip", "retclip_oracle"} & set(self.rows)
        if self.fallback and not retclip:
            raise ValueError("fallback is for the rows retclip and retclip_oracle")
        if bool(self.clip_rc.weights) != (self.method == "clip_rc"):
            raise ValueError("give clip_rc.weights with method=clip_rc, and with no other")
        if self.unseen and self.folder:
            raise ValueError("unseen is for scenes and dataset; folder has its own")
        if self.method == "knn" and (self.protocol or self.fossil.windows is not None):
            raise ValueError("method=knn uses whole images: leave out protocol and windows")
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
        for name in ("freeda", "rns", "clip_rc"):
            if getattr(self, name).windows is not None:
                raise ValueError(
                    f"{name}.windows must be null; protocol or fossil.windows slides some"
                )
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
        found = replace(protocol_of(self.protocol, self.dataset), proposals=self.proposals)
        if self.method == "clip_rc" and self.clip_rc.seen_penalty == 0:
            return replace(found, seen_penalty=0.0)
        return found

    def open_training(self, data: LabelledSet) -> LabelledSet:
        """Opens the training images of `method=knn` without reading them.

        Raises:
            InputError: as `open_data`; or their classes differ from those of `data`.
        """
        if self.knn.folder:
            training = open_label_folder(self.knn.folder).first(self.knn.images)
        elif self.dataset:
            training = open_any_set(self.dataset, self.root, "train", self.names)
            training = training.first(self.knn.images)
        else:
            training = training_scenes(self.knn.images or 400)
        if training.class_list.classes != data.class_list.classes:
            raise InputError(
                f"the training images ({training.name}) have other classes than the evaluated "
                f"images ({data.name}): give both the same class list"
            )
        return training

    def open_data(self) -> LabelledSet:
        """Opens the data set without reading images.

        Raises:
            InputError: it does not exist, or is incomplete or invalid.
        """
        data = self._open()
        if not self.unseen:
            return data
        return replace(data, seen=seen_of(data.class_names, self.unseen, data.name))

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
