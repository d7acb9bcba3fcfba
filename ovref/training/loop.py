"""The training loop, for any head on frozen models.

    trained = train(model, losses_of, batches, TrainingConfig(steps=1000), store, identity={...})

`batches(step, part, parts)` gives one of `parts` equal parts of a step's images, a pure function of
its arguments; `losses_of(model, batch)` gives the losses of each image. The loss of a step is the
sum of the means over all its images. So a step is the same however its images are spread over
workers and accumulated parts, and a killed training resumes to the same weights.

Workers are processes of one `torch.distributed` group (`process_group.joined`), each of which calls
`train`.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ovref.ahead import map_ahead
from ovref.errors import ConfigError, ModelError
from ovref.identity import canonical, fingerprint
from ovref.storage.file_store import Store
from ovref.training import checkpoints
from ovref.training.process_group import place
from ovref.training.settings import UNCOUNTED, TrainingConfig, rate_at
from ovref.training.tensorboard_log import Summary
from ovref_inference.models import copy_weights

Say = Callable[[str], None]


Batches = Callable[[int, int, int], Any]
"""Step, part, parts -> the batch of that part: its images' `names`, and what `losses_of` takes."""
Losses = Callable[[Any, Any], Mapping[str, torch.Tensor]]
"""Model, batch -> (images,) of each term of the loss, already weighted."""


def train(
    model: nn.Module,
    losses_of: Losses,
    batches: Batches,
    config: TrainingConfig,
    store: Store,
    *,
    identity: Mapping[str, Any],
    say: Say = lambda line: None,
) -> Mapping[str, Any]:
    """Trains all parameters of a model that require gradients, in place.

    Args:
        model: on its device, all parameters float32, the same on all workers.
        losses_of: gives the losses of each image of a batch.
        batches: gives a part of a step's images.
        config: how long and how fast.
        store: where checkpoints are kept; the newest one is resumed.
        identity: what else a checkpoint must have been trained with to be resumed: data, models.
        say: receives lines of progress; on worker 0 alone.

    Returns:
        `steps`, `seconds` over all starts, and `history`: rows of the mean losses, the rate and the
        gradients' norm of every `log_every` steps.

    Raises:
        ModelError: a loss or a gradient is not finite; the last checkpoint is kept.
        MismatchError: the store has a training of other settings.
        StorageError: its checkpoint is damaged.
        ConfigError: the batch is no multiple of workers and parts.
    """
    rank, workers = place()
    parts = workers * config.accumulate
    if config.batch % parts:
        raise ConfigError(
            f"batch must be a multiple of workers times accumulate, found {config.batch} images "
            f"for {workers} x {config.accumulate}"
        )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(_groups(trained, config), lr=config.rate)
    whole = _identity(config, identity)
    first, history, before = _resumed(store, trained, optimiser, whole)
    if first:
        say(f"resuming after step {first} of {config.steps}")
    for parameter in trained.values():
        _shared(parameter.data)
    started, said = time.monotonic(), time.monotonic()
    rows: list[Mapping[str, float]] = []
    model.train()
    own = range(rank * config.accumulate, (rank + 1) * config.accumulate)
    steps = range(first, config.steps)
    ahead = map_ahead(lambda step: [(p, batches(step, p, parts)) for p in own], steps, threads=1)
    with closing(ahead), Summary(config, store) as summary:
        for step, batch in zip(steps, ahead, strict=True):
            rate = rate_at(step, config)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            terms = _step(model, losses_of, batch, trained, config, step)
            norm = _clipped(trained, config.clip_norm)
            if not (math.isfinite(sum(terms.values())) and math.isfinite(norm)):
                _refuse(terms, norm, step, batch, store)
            optimiser.step()
            rows.append({**terms, "loss": sum(terms.values()), "norm": norm})
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                history.append({"step": done, "rate": rate, **_means(rows)})
                summary.add(history[-1])
            now = time.monotonic()
            if now - said >= 5 or done == config.steps:
                say(_progress(done, first, config, rows[-1], now - started))
                said = now
            if done % config.log_every == 0:
                rows.clear()
            if rank == 0 and _is_saved(done, config):
                seconds = before + now - started
                _save(store, done, trained, optimiser, history, seconds, whole, config)
    model.eval()
    if workers > 1:
        dist.barrier()
    seconds = before + time.monotonic() - started
    return {"steps": config.steps, "seconds": round(seconds, 1), "history": history}


def _step(
    model: nn.Module,
    losses_of: Losses,
    parts: Iterable[tuple[int, Any]],
    trained: Mapping[str, nn.Parameter],
    config: TrainingConfig,
    step: int,
) -> dict[str, float]:
    """Gradients of a step, summed over parts and workers; the mean losses."""
    for parameter in trained.values():
        parameter.grad = None
    device = next(iter(trained.values())).device
    total: dict[str, torch.Tensor] = {}
    for part, batch in parts:
        # What is dropped depends on the part alone, whoever processes it.
        torch.manual_seed(int(fingerprint([config.seed, step, part])[:15], 16))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            terms = losses_of(model, batch)
        means = {name: term.float().sum() / config.batch for name, term in terms.items()}
        loss = torch.stack(list(means.values())).sum()
        if loss.requires_grad:
            loss.backward()
        for name, mean in means.items():
            total[name] = total.get(name, 0) + mean.detach()
    _summed([_gradient(parameter) for parameter in trained.values()])
    values = torch.stack(list(total.values()))
    _summed([values])
    return dict(zip(total, values.tolist(), strict=True))


def _groups(trained: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    """Parameters by the first pattern that fits; `factor` multiplies the learning rate."""
    groups: list[dict[str, Any]] = [
        {
            "params": [],
            "factor": group.rate,
            "weight_decay": config.decay if group.decay is None else group.decay,
        }
        for group in config.groups
    ]
    groups.append({"params": [], "factor": 1.0, "weight_decay": config.decay})
    for name, parameter in trained.items():
        fits = (i for i, group in enumerate(config.groups) if re.search(group.pattern, name))
        groups[next(fits, -1)]["params"].append(parameter)
    if not trained:
        raise ModelError("nothing of the model requires gradients: there is nothing to train")
    unused = [g.pattern for g, of in zip(config.groups, groups, strict=False) if not of["params"]]
    if unused:
        raise ConfigError(
            f"no trained parameter belongs to the groups {unused}; they are named like "
            f"{', '.join(list(trained)[:5])}"
        )
    return [group for group in groups if group["params"]]


def _identity(config: TrainingConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in canonical(config).items() if k not in UNCOUNTED}
    return {**identity, "training": settings}


def _resumed(
    store: Store,
    trained: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> tuple[int, list[Mapping[str, Any]], float]:
    """Steps, history and seconds of the newest checkpoint, which is loaded; 0 without one."""
    saved = checkpoints.steps_saved(store)
    if not saved:
        return 0, [], 0.0
    found = checkpoints.read(store, saved[-1], identity)
    copy_weights(trained, found.weights, f"{store.url}, step {found.step}")
    for key, value in found.optimiser.items():
        name, _, moment = key.rpartition(".")
        where = "cpu" if moment == "step" else trained[name].device
        optimiser.state[trained[name]][moment] = value.to(where)
    return found.step, list(found.history), found.seconds


def _is_saved(done: int, config: TrainingConfig) -> bool:
    return done % config.save_every == 0 or done in (config.middle, config.steps)


def _save(
    store: Store,
    done: int,
    trained: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    history: Sequence[Mapping[str, float]],
    seconds: float,
    identity: Mapping[str, Any],
    config: TrainingConfig,
) -> None:
    moments = {
        f"{name}.{moment}": value
        for name, parameter in trained.items()
        for moment, value in optimiser.state.get(parameter, {}).items()
    }
    before = checkpoints.steps_saved(store)
    found = checkpoints.Checkpoint(
        step=done, weights=trained, optimiser=moments, history=history, seconds=seconds
    )
    checkpoints.write(store, found, identity)
    # Two, in case that the newest is damaged.
    checkpoints.delete_but(store, [config.middle, *before[-1:], done])


def _refuse(terms: Mapping[str, float], norm: float, step: int, parts: Any, store: Store) -> None:
    saved = checkpoints.steps_saved(store)
    kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there is no checkpoint yet"
    words = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    names = [name for _, batch in parts for name in batch.names]
    raise ModelError(
        f"the loss or its gradients are not finite at step {step + 1} ({words}; norm of the "
        f"gradients {norm:g}), for the images {', '.join(names[:20])}; {kept} in {store.url}. Look "
        "at these images, or lower training.rate, set training.clip_norm or "
        "training.precision=float32"
    )


def _clipped(trained: Mapping[str, nn.Parameter], limit: float | None) -> float:
    """The gradients' norm; they are scaled where it is above the limit."""
    gradients = [_gradient(parameter) for parameter in trained.values()]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(list(trained.values()), limit, norm)
    return norm.item()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's gradient; of one that the loss did not use, zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _progress(
    done: int, first: int, config: TrainingConfig, row: Mapping[str, float], seconds: float
) -> str:
    rate = (done - first) / max(seconds, 1e-9)
    left = int((config.steps - done) / rate)
    terms = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("loss", "norm"))
    return (
        f"step {done} of {config.steps}: loss {row['loss']:.4g} ({terms}), "
        f"{rate * config.batch:.3g} images/s, "
        f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} to go"
    )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _summed(tensors: Sequence[torch.Tensor]) -> None:
    """Sums tensors of one kind over all workers, in place, in one message."""
    if place()[1] == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _shared(tensor: torch.Tensor) -> None:
    """Gives every worker the values of worker 0."""
    if place()[1] > 1:
        dist.broadcast(tensor, 0)
