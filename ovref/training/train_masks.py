"""Training of heads whose queries give masks and embeddings that any texts are compared with:
FC-CLIP's (Yu et al., NeurIPS 2023), which is RetCLIP's mask generator and in-vocabulary classifier,
and VOCSeg's MaskFormer (section 3.2, after Xu et al. and Liang et al.).

Masks of unseen classes are never shown: their pixels are of no segment, as those without a label.
"""

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from transformers import AutoConfig, MaskFormerForInstanceSegmentation, SwinModel

from ovref.check_models import weights_fingerprint
from ovref.config import dump
from ovref.errors import InputError, ModelError
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.storage.file_store import Store
from ovref.training.labelled_batches import LabelledBatches
from ovref.training.labelled_data import classes_text, data_identity, shown_classes
from ovref.training.loop import Losses, train
from ovref.training.mask_settings import (
    FcClipNetwork,
    FcClipTraining,
    MaskFormerTraining,
    MaskTraining,
    Start,
)
from ovref.training.matching import losses_of
from ovref.training.process_group import joined, place
from ovref_inference.collection.retrieve import class_embeddings
from ovref_inference.encoders import clip_towers, cnn_towers
from ovref_inference.encoders.config import TextEncoderConfig
from ovref_inference.encoders.load import load_text_encoder
from ovref_inference.models import canonical, copy_weights, model_errors, pretrained
from ovref_inference.pixels import Pixels, device_of
from ovref_inference.proposers import fcclip
from ovref_inference.proposers.mask_decoder import Decoded, MaskDecoder
from ovref_inference.proposers.open_mask_former import OpenMaskFormer, processing, settings_of

Say = Callable[[str], None]


class MaskNetwork(nn.Module):
    """A head, on the feature maps of a frozen CLIP if it has one; what the loop trains."""

    def __init__(self, head: Any, visual: Any = None) -> None:
        """
        Args:
            head: a `MaskDecoder` for the tower's maps, or an `OpenMaskFormer`, which needs none.
            visual: a tower of `cnn_towers`, frozen here.
        """
        super().__init__()
        self.head = head
        self.visual = None if visual is None else visual.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MaskNetwork":
        """Sets the mode of every part but CLIP, which always evaluates."""
        super().train(mode)
        if self.visual is not None:
            self.visual.eval()
        return self

    def forward(self, pixels: torch.Tensor) -> list[Decoded]:
        """(n, 3, H, W) normalised pixels -> masks and embeddings by each layer, the last at the
        end."""
        if self.visual is None:
            return self.head.every_layer(pixels)
        with torch.no_grad():
            maps = cnn_towers.pyramid(self.visual, pixels)
        return self.head(maps)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a training needs, loaded and checked."""

    data: LabelledSet
    shown: tuple[int, ...]
    """Positions in the set's class list of the classes whose masks are shown."""
    names: tuple[str, ...]
    """All names of these, synonyms included."""
    network: MaskNetwork
    losses_of: Losses
    batches: LabelledBatches
    store: Store
    identity: Mapping[str, Any]
    device: torch.device


def run_as_worker(spec: MaskTraining, say: Say = print) -> dict[str, Any]:
    """`run`, as one of the workers that a launcher started if it did; worker 0 reports progress."""
    with joined(spec.device) as device:
        return run(replace(spec, device=device), say if place()[0] == 0 else lambda line: None)


def run(spec: MaskTraining, say: Say = print) -> dict[str, Any]:
    """Trains, or resumes training, and writes the model: a folder of `proposers.fcclip`, or of
    `proposers.open_mask_former`.

    Returns:
        The facts about the training that the model's JSON file records.

    Raises:
        InputError: the data is not as it should be.
        ModelError: a model cannot be loaded or does not fit the settings, or a loss is not finite.
        MismatchError: the output is of another training.
        StorageError: the output cannot be written, or its checkpoint is damaged.
    """
    made = prepare(spec)
    result = train(
        made.network, made.losses_of, made.batches, spec.training, made.store,
        identity=made.identity, say=say,
    )  # fmt: skip
    names = made.data.class_names
    settings = {k: v for k, v in dump(spec).items() if k not in ("output", "device")}
    facts = {
        "data": made.data.name,
        "seen": [names[label] for label in made.shown],
        "unseen": [name for label, name in enumerate(names) if label not in made.shown],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "settings": settings,
        "last": dict(result["history"][-1]),
    }
    if place()[0] == 0:
        if isinstance(spec, FcClipTraining):
            _write_fcclip(spec, made, facts)
        elif isinstance(spec, MaskFormerTraining):
            _write_mask_former(spec, made, facts)
        say(f"written to {spec.output}")
    return facts


def check(spec: MaskTraining) -> str:
    """A dry run: opens data, reads a batch, loads the models and makes one step with one image;
    nothing is written.

    Returns:
        What was found, for people.

    Raises:
        As `run`.
    """
    made = prepare(spec)
    began = time.monotonic()
    batch = made.batches(0, 0, spec.training.batch)
    made.network.train()
    terms = {name: term.item() for name, term in _step(made, batch).items()}
    if not np.isfinite(list(terms.values())).all():
        raise InputError(f"the losses of {', '.join(batch.names)} are not finite: {terms}")
    seconds = time.monotonic() - began
    count = sum(p.numel() for p in made.network.parameters() if p.requires_grad)
    masks = len(np.unique(batch.segments_nhw[batch.segments_nhw >= 0]))
    found = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
    return (
        f"{classes_text(made.data, made.shown)}\n"
        f"{count / 1e6:.2f} million weights to train\n{masks} masks in {batch.names[0]}; {found}\n"
        f"{spec.training.hours_text(seconds, made.device.type)}"
    )


def _step(made: Prepared, batch: Any) -> dict[str, torch.Tensor]:
    terms = {name: term.sum() for name, term in made.losses_of(made.network, batch).items()}
    torch.stack(list(terms.values())).sum().backward()
    return {name: term.detach() for name, term in terms.items()}


def prepare(spec: MaskTraining) -> Prepared:
    """Opens the data, loads CLIP and makes the network. Raises as `run`."""
    if not isinstance(spec, FcClipTraining | MaskFormerTraining):
        raise TypeError(f"expected the settings of one of the two trainings, found {type(spec)}")
    data = spec.data.open()
    shown = shown_classes(data)
    store = Store.open(spec.output)
    batches = LabelledBatches(
        data, shown, spec.data, shown=shown, size_hw=spec.network.size_hw,
        batch=spec.training.batch, seed=spec.training.seed, instances=True,
    )  # fmt: skip
    batches(0, 0, spec.training.batch)  # faults in the data are reported before models load
    device = device_of(spec.device)
    torch.manual_seed(spec.training.seed)
    class_of = [i for i, label in enumerate(shown) for _ in data.class_list.classes[label]]
    names = tuple(chain.from_iterable(data.class_list.classes[label] for label in shown))
    revision = getattr(spec.network, "revision", "")
    text = load_text_encoder(
        TextEncoderConfig(model=spec.network.model, revision=revision), device="cpu"
    )
    texts_nd = torch.from_numpy(class_embeddings(text, names, spec.templates))
    if isinstance(spec, FcClipTraining):
        network, pixels = _fcclip(spec.network, device)
    else:
        network, pixels = _mask_former(spec, names, texts_nd, device)
    network = network.to(device)
    return Prepared(
        data=data, shown=shown, names=names, network=network, batches=batches, store=store,
        identity=_identity(spec, data), device=device,
        losses_of=losses_of(
            spec.losses, texts_nd.to(device), class_of, pixels, spec.training.seed
        ),
    )  # fmt: skip


def _fcclip(config: FcClipNetwork, device: torch.device) -> tuple[MaskNetwork, Pixels]:
    model, _ = clip_towers.load_clip(config.model, "")
    visual = fcclip.convolutional(model, config.model)
    found = tuple(cnn_towers.widths(visual)), cnn_towers.joint_width(visual)
    if found != (config.decoder.widths, config.decoder.dim):
        raise ModelError(
            f"network.decoder must have widths {found[0]} and dim {found[1]}, which are those of "
            f"{config.model}; found {config.decoder.widths} and {config.decoder.dim}"
        )
    return MaskNetwork(MaskDecoder(config.decoder), visual), Pixels.of_open_clip(
        model, device, torch.float32
    )


def _mask_former(
    spec: MaskFormerTraining, names: tuple[str, ...], texts_nd: torch.Tensor, device: torch.device
) -> tuple[MaskNetwork, Pixels]:
    config = spec.network
    settings = settings_of(
        config.sizes, names, texts_nd.shape[1], templates=spec.templates, texts=len(names)
    )
    with model_errors("make the MaskFormer that network.sizes describes"):
        head = OpenMaskFormer(settings)
    head.trained_texts.copy_(texts_nd)
    if config.start is not None:
        _begin_with(head, config.start)
    return MaskNetwork(head), Pixels(config.mean, config.std, "bilinear", device, torch.float32)


RENAMED = (
    (r"attention\.q_proj", "attention.self.query"),
    (r"attention\.k_proj", "attention.self.key"),
    (r"attention\.v_proj", "attention.self.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"attention\.relative_position_bias\.", "attention.self."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
"""Names of transformers' Swin, and of the one in its MaskFormer."""


def _begin_with(head: OpenMaskFormer, start: Start) -> None:
    """Gives a network the weights of a Swin or MaskFormer. Raises ModelError if they do not fit."""
    path, options = pretrained(start.model, start.revision)
    own: Any = head
    found: Any
    with model_errors(f"begin with {start.model}"):
        kind = AutoConfig.from_pretrained(path, **options).model_type
        if kind == "maskformer":
            found = MaskFormerForInstanceSegmentation.from_pretrained(path, **options)
        elif kind == "swin":
            found = SwinModel.from_pretrained(path, add_pooling_layer=False, **options)
            own = head.model.pixel_level_module.encoder.model
        else:
            raise ValueError(f"it is a {kind}, expected a swin or maskformer")
    classes = ("class_predictor.", "void")
    wanted = {n: p for n, p in own.named_parameters() if not n.startswith(classes)}
    given = {}
    for name, value in found.named_parameters():
        if name.startswith(classes):
            continue
        new = name
        for old, ours in RENAMED if kind == "swin" else ():
            new = re.sub(old, ours, new)
        given[new] = value
    copy_weights(wanted, given, start.model)


def _identity(spec: MaskTraining, data: LabelledSet) -> dict[str, Any]:
    """What, beside the loop's settings, a checkpoint must have been trained with."""
    network: Any = spec.network  # type: ignore[attr-defined]
    start = getattr(network, "start", None)
    return {
        "method": "fcclip" if isinstance(spec, FcClipTraining) else "mask_former",
        **data_identity(spec, data),
        "clip": weights_fingerprint(network.model, getattr(network, "revision", "")),
        "start": start and weights_fingerprint(start.model, start.revision),
    }


def _write_fcclip(spec: FcClipTraining, made: Prepared, facts: Mapping[str, Any]) -> None:
    """The settings last: a folder without them is no model."""
    state = made.network.head.state_dict()
    fields = {
        "format": fcclip.FORMAT, "clip": canonical(spec.network.model),
        "decoder": asdict(spec.network.decoder), "trained_names": made.names,
        "templates": spec.templates, "training": facts,
    }  # fmt: skip
    made.store.write(fcclip.WEIGHTS, save({k: v.cpu().contiguous() for k, v in state.items()}))
    made.store.write(fcclip.SETTINGS, json.dumps(fields, indent=1).encode())


def _write_mask_former(spec: MaskFormerTraining, made: Prepared, facts: Mapping[str, Any]) -> None:
    """As transformers writes it, the configuration last."""
    head, config = made.network.head, spec.network
    head.config.open_classes["training"] = dict(facts)
    with tempfile.TemporaryDirectory() as scratch:
        head.save_pretrained(scratch)
        processing(config.short_side, config.long_side, config.mean, config.std).save_pretrained(
            scratch
        )
        for path in sorted(Path(scratch).iterdir(), key=lambda one: one.name == "config.json"):
            made.store.write(path.name, path.read_bytes())
