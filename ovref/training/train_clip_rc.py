"""Training of CLIP-RC (Zhang et al., CVPR 2024): what is trained on what, and the run.

- inductive: masks of the seen classes; neither masks nor names of the unseen ones are known.
- transductive: begins with the middle checkpoint of an inductive training; the names of the unseen
  classes are known, and their pixels take the class that the network itself finds best.
- supervised: masks of all classes.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch.nn.functional import interpolate

from ovref.check_models import weights_fingerprint
from ovref.config import STRICT, dump
from ovref.errors import InputError
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.storage.file_store import Store
from ovref.training import checkpoints
from ovref.training.labelled_batches import LabelledBatch, LabelledBatches, TrainingData
from ovref.training.labelled_data import classes_text, data_identity, shown_classes
from ovref.training.loop import Losses, train
from ovref.training.losses import (
    class_targets,
    dice_loss,
    focal_loss,
    pseudo_labels,
    recovery_loss,
)
from ovref.training.process_group import joined, place
from ovref.training.settings import TrainingConfig
from ovref_inference.collection.retrieve import class_embeddings
from ovref_inference.encoders.config import TextEncoderConfig
from ovref_inference.encoders.load import load_text_encoder
from ovref_inference.models import copy_weights
from ovref_inference.pixels import Pixels, device_of
from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.clip_rc import HEAD, WEIGHTS, ClipRcHead
from ovref_inference.segmenters.clip_rc_config import ClipRcNetworkConfig
from ovref_inference.segmenters.clip_rc_network import ClipRcNetwork, load_network

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ClipRcLosses:
    """Weights of the losses (eq. 11); the defaults are the original's for VOC."""

    __pydantic_config__ = STRICT

    focal: float = 100.0
    """Weight of the focal loss."""
    dice: float = 1.0
    """Weight of the dice loss."""
    recovery: float = 2.0
    """Weight of the recovery loss, a mean over numbers; the paper's eq. 10 is a sum."""
    recovery_kind: Literal["l1", "l2"] = "l1"
    """Absolute or squared differences (table 8)."""
    unlabelled: Literal["ignored", "negative"] = "ignored"
    """Whether a pixel without a label says nothing, or says that it is of none of the classes, as
    in the original."""

    def __post_init__(self) -> None:
        for name in ("focal", "dice", "recovery"):
            require_at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class ClipRcTraining:
    """Settings of `ovref train`."""

    __pydantic_config__ = STRICT

    output: str
    """Folder or URL for the trained head and its checkpoints, with which the same command
    resumes."""
    data: TrainingData
    """Images and labels."""
    setting: Literal["inductive", "transductive", "supervised"] = "inductive"
    """What is known of the unseen classes: nothing, their names, or their masks."""
    start: str = ""
    """For `transductive`: output of an inductive training, with whose middle checkpoint this one
    begins."""
    network: ClipRcNetworkConfig = field(default_factory=ClipRcNetworkConfig)
    """The frozen CLIP and the trained parts."""
    losses: ClipRcLosses = field(default_factory=ClipRcLosses)
    """Weights of the losses."""
    templates: tuple[str, ...] = ("a photo of a {}",)
    """What class names are put into, for their text embeddings, which are averaged."""
    training: TrainingConfig
    """The loop."""
    device: str | None = None
    """"cpu", "cuda", ...; null takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if bool(self.start) != (self.setting == "transductive"):
            raise ValueError("give start with setting transductive, and with no other")


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Which classes are trained, by their positions in the set's class list."""

    classes: tuple[int, ...]
    """Those that the network knows of, in the order of its scores."""
    shown: tuple[int, ...]
    """Those whose masks it is shown."""


def run_as_worker(spec: ClipRcTraining, say: Say = print) -> dict[str, Any]:
    """`run`, as one of the workers that a launcher started if it did; worker 0 reports progress."""
    with joined(spec.device) as device:
        return run(replace(spec, device=device), say if place()[0] == 0 else lambda line: None)


def run(spec: ClipRcTraining, say: Say = print) -> dict[str, Any]:
    """Trains, or resumes training, and writes the trained head.

    Returns:
        The facts about the training that the head's JSON file records.

    Raises:
        InputError: the data is not as it should be.
        ModelError: CLIP cannot be loaded or does not fit the settings, or a loss is not finite.
        MismatchError: the output, or `start`, is of another training.
        StorageError: the output cannot be written, or its checkpoint is damaged.
    """
    made = prepare(spec)
    result = train(
        made.network, made.losses_of, made.batches, spec.training, made.store,
        identity=made.identity, say=say,
    )  # fmt: skip
    facts = {
        "data": made.data.name,
        "steps": result["steps"],
        "seconds": result["seconds"],
        "settings": dump(spec),
        "last": dict(result["history"][-1]),
    }
    if place()[0] == 0:
        _write_head(spec, made, facts)
        say(f"written to {spec.output}: {HEAD}, {WEIGHTS}")
    return facts


def check(spec: ClipRcTraining) -> str:
    """A dry run: opens data, reads one batch, loads CLIP and makes one step; nothing is written.

    Returns:
        What was found, for people.

    Raises:
        As `run`.
    """
    made = prepare(spec)
    began = time.monotonic()
    batch = made.batches(0, 0, spec.training.batch)  # one image
    made.network.train()
    loss = sum(term.sum() for term in made.losses_of(made.network, batch).values())
    if not isinstance(loss, torch.Tensor) or not torch.isfinite(loss):
        raise InputError(f"the loss of {', '.join(batch.names)} is not finite: {loss}")
    loss.backward()
    seconds = time.monotonic() - began
    count = sum(p.numel() for p in made.network.parameters() if p.requires_grad)
    return (
        f"{classes_text(made.data, made.split.shown)}\n"
        f"{count / 1e6:.2f} million weights to train on {spec.network.model}\n"
        f"{spec.training.hours_text(seconds, made.device.type)}"
    )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a training needs, loaded and checked."""

    data: LabelledSet
    split: _Split
    network: ClipRcNetwork
    losses_of: Losses
    batches: LabelledBatches
    store: Store
    identity: Mapping[str, Any]
    device: torch.device


def prepare(spec: ClipRcTraining) -> Prepared:
    """Opens the data, loads CLIP and makes the network. Raises as `run`."""
    data = spec.data.open()
    split = _split(data, spec.setting)
    store = Store.open(spec.output)
    batches = LabelledBatches(
        data, split.classes, spec.data, shown=split.shown, size_hw=spec.network.size_hw,
        batch=spec.training.batch, seed=spec.training.seed,
    )  # fmt: skip
    batches(0, 0, spec.training.batch)  # faults in the data are reported before models load
    device = device_of(spec.device)
    torch.manual_seed(spec.training.seed)
    network, pixels = load_network(spec.network, device)
    identity = _identity(spec, data)
    if spec.start:
        seen = [data.class_names[label] for label in shown_classes(data)]
        identity["start"] = _start(spec, network, seen)
    text = load_text_encoder(
        TextEncoderConfig(model=spec.network.model, revision=spec.network.revision), device="cpu"
    )
    names = [data.class_names[label] for label in split.classes]
    embeddings = torch.from_numpy(class_embeddings(text, names, spec.templates)).to(device)
    unseen = torch.tensor([label not in split.shown for label in split.classes], device=device)
    return Prepared(
        data=data, split=split, network=network, batches=batches, store=store, identity=identity,
        losses_of=losses_of(spec.losses, embeddings, unseen, pixels), device=device,
    )  # fmt: skip


def losses_of(
    config: ClipRcLosses, classes_cd: torch.Tensor, unseen_c: torch.Tensor, pixels: Pixels
) -> Losses:
    """The losses of a batch, as the loop takes them.

    Args:
        config: weights.
        classes_cd: text embeddings of the classes.
        unseen_c: (classes,) bool: classes that have no masks, for self-training.
        pixels: of `load_network`.
    """

    def losses(network: Any, batch: LabelledBatch) -> dict[str, torch.Tensor]:
        size_hw = batch.labels_nhw.shape[1:]
        found = network(pixels(list(batch.images_nhwc), size_hw), classes_cd)
        logits = interpolate(found.logits_nchw.float(), size=size_hw, mode="bilinear")
        labels = torch.from_numpy(batch.labels_nhw).to(logits.device)
        if unseen_c.any():
            labels = pseudo_labels(logits, labels, unseen_c)
        targets = class_targets(labels, len(classes_cd))
        known = labels >= 0
        if config.unlabelled == "negative":
            known = torch.ones_like(known)
        terms = {
            "focal": config.focal * focal_loss(logits, targets, known),
            "dice": config.dice * dice_loss(logits, targets, known),
        }
        if found.recovery is not None and config.recovery:
            one = found.recovery
            recovered = recovery_loss(
                one.patches_npd, one.wanted_patches_npd, config.recovery_kind
            ) + recovery_loss(one.descriptors_nqe, one.wanted_descriptors_nqe, config.recovery_kind)
            terms["recovery"] = config.recovery * recovered
        return terms

    return losses


def _split(data: LabelledSet, setting: str) -> _Split:
    """Raises InputError where the setting needs unseen classes and there are none."""
    every = tuple(range(len(data.class_names)))
    shown = every if setting == "supervised" else shown_classes(data)
    if setting == "transductive" and shown == every:
        raise InputError(
            f"{data.name} has no unseen classes, which a transductive training is for: name them "
            "in data.unseen, or choose a set with a split"
        )
    return _Split(classes=shown if setting == "inductive" else every, shown=shown)


def _identity(spec: ClipRcTraining, data: LabelledSet) -> dict[str, Any]:
    """What, beside the loop's settings, a checkpoint must have been trained with."""
    return {
        "method": "clip_rc",
        **data_identity(spec, data, without=("start",)),
        "clip": weights_fingerprint(spec.network.model, spec.network.revision),
    }


def _start(spec: ClipRcTraining, network: ClipRcNetwork, seen: list[str]) -> str:
    """Puts the middle checkpoint of an inductive training into the network; its checksum.

    Raises:
        MismatchError: it is of another architecture, CLIP or class split, or no inductive one.
        InputError: it has no such checkpoint yet.
    """
    store = Store.open(spec.start)
    saved = checkpoints.steps_saved(store)
    identity = checkpoints.identity_of(store, saved[-1]) if saved else {}
    steps = identity.get("training", {}).get("steps", 0)
    if not steps or steps // 2 not in saved:
        raise InputError(
            f"{spec.start} has no checkpoint of half its steps, expected the output of an "
            "inductive training that came so far"
        )
    wanted = {"setting": "inductive", "seen": seen, "network": dump(spec.network)}
    checkpoints.check_identity(store, {name: identity.get(name) for name in wanted}, wanted)
    found = checkpoints.read(store, steps // 2)
    copy_weights(network.trained_state(), found.weights, f"{spec.start}, step {found.step}")
    return checkpoints.checksum(found.weights)


def _write_head(spec: ClipRcTraining, made: Prepared, facts: Mapping[str, Any]) -> None:
    """The weights first: a reader of both files finds their checksum in the second one."""
    names, shown = made.data.class_names, made.split.shown
    state = made.network.trained_state(with_recovery=False)
    weights = save({name: value.cpu().contiguous() for name, value in state.items()})
    head = ClipRcHead(
        network=spec.network,
        dim=made.network.dim,
        seen=tuple(names[label] for label in shown),
        unseen=tuple(name for label, name in enumerate(names) if label not in shown),
        setting=spec.setting,
        templates=spec.templates,
        training=facts,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    made.store.write(WEIGHTS, weights)
    made.store.write(HEAD, head.encoded())
