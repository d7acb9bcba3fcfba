"""One training loop for all models of the miniature: seeded, resumable, averaged, logged.

The random numbers of a step depend on (name, step) alone, so a resumed run draws the same numbers
as an uninterrupted one. The learning rate warms up, stays flat and falls linearly to zero over the
last part, so the number of steps may change when a run is resumed.
"""

import argparse
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch


def parse_arguments(description, **steps):
    """The command line that all recipes share: work folder, threads and numbers of steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    for name, count in steps.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=count)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    return arguments


def rate_factor(step, steps, warmup=100, fall=0.3):
    """Multiplier of the learning rate in [0, 1]; `fall` is the share of steps that descend."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / max(1, fall * steps)))


class Muon(torch.optim.AdamW):
    """AdamW whose matrices move by orthogonal steps (Muon: Jordan et al., 2024), kernels of
    convolutions as matrices too. After 300 steps `miniature:clip_convnext` names 57% of things,
    with AdamW alone 17%. timm's does the same in bfloat16, which is slow on a CPU."""

    MOMENTUM = 0.95
    SCALE = 0.6
    """Factor of steps, beside the root of a matrix's longer side: three times the change that AdamW
    usually makes."""

    def __init__(self, parameters, rate, **options):
        parameters = list(parameters)
        vectors = [p for p in parameters if p.ndim < 2]
        self.matrices = [p for p in parameters if p.ndim >= 2]
        groups = [{"params": vectors}, {"params": self.matrices}]
        super().__init__(groups, rate, **options)

    @torch.no_grad()
    def step(self, closure=None):
        rate, decay = (self.param_groups[1][name] for name in ("lr", "weight_decay"))
        for matrix in self.matrices:
            state = self.state[matrix]
            if not state:
                # AdamW wants the first of these of every parameter when it is loaded.
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}
            state["momentum"].lerp_(matrix.grad, 1 - self.MOMENTUM)
            towards = matrix.grad.lerp(state["momentum"], self.MOMENTUM).flatten(1)
            step = rate * self.SCALE * max(towards.shape) ** 0.5 * orthogonal(towards)
            matrix.mul_(1 - rate * decay).sub_(step.view_as(matrix))
            matrix.grad = None  # AdamW leaves it alone
        return super().step(closure)


def orthogonal(matrix):
    """Nearly the nearest matrix with orthogonal rows or columns, by five Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.T if tall else x


def fit(
    name, work, model, loss_of, steps, rate, decay=0.01, average=0.995, save_every=200,
    optimiser=torch.optim.AdamW,
):  # fmt: skip
    """Trains `model` in place and leaves the moving average of its weights in it.

    Args:
        name: of the checkpoint `work/<name>.pt` and of the log `work/<name>.jsonl`.
        work: folder; an existing checkpoint in it is continued.
        model: torch Module; all parameters that require gradients are trained.
        loss_of: (step, numpy Generator) -> scalar loss, or (loss, dict of floats to log).
        steps: total number of steps, those of earlier starts included.
        rate: highest learning rate.
        decay: weight decay.
        average: decay of the moving average per step, in [0, 1).
        save_every: steps between checkpoints.
        optimiser: class of the optimiser, AdamW or Muon.

    Returns:
        dict with `steps` and `seconds` (of all starts together).
    """
    path, log = Path(work) / f"{name}.pt", Path(work) / f"{name}.jsonl"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = optimiser(trained, rate, betas=(0.9, 0.98), weight_decay=decay)
    mean = [p.detach().clone() for p in trained]
    first, seconds = 0, 0.0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        if "optimiser" in state:
            optimiser.load_state_dict(state["optimiser"])
        mean, first, seconds = state["mean"], state["step"], state["seconds"]
    began, losses = time.perf_counter(), []

    model.train()
    for step in range(first, steps):
        seed = [zlib.crc32(name.encode()), step]
        torch.manual_seed(seed[0] * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = rate * rate_factor(step, steps)
        loss = loss_of(step, np.random.default_rng(seed))
        loss, extra = loss if isinstance(loss, tuple) else (loss, {})
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: loss is {loss.item()} at step {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        with torch.no_grad():
            # A smaller decay at first, or the average would retain the initial weights.
            keep = min(average, (step + 1) / (step + 10))
            torch._foreach_lerp_(mean, trained, 1 - keep)
        losses.append({"loss": loss.item(), **extra})
        if (step + 1) % 50 == 0:
            row = {k: round(float(np.mean([entry[k] for entry in losses])), 5) for k in losses[0]}
            row |= {"step": step + 1, "seconds": round(seconds + time.perf_counter() - began, 1)}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            losses = []
        if (step + 1) % save_every == 0 or step + 1 == steps:
            so_far = seconds + time.perf_counter() - began
            save_checkpoint(path, model, mean, step + 1, so_far, optimiser=optimiser.state_dict())
    with torch.no_grad():
        for parameter, value in zip(trained, mean, strict=True):
            parameter.copy_(value)
    model.eval()
    return {"steps": steps, "seconds": round(seconds + time.perf_counter() - began, 1)}


def save_checkpoint(path, model, mean, step, seconds, **optimiser):
    """Writes a checkpoint, whole or not at all; without an `optimiser`, `fit` makes a new one.

    Args:
        mean: moving averages of the parameters that are trained, in their order.
        step: steps done.
        seconds: of all starts together.
    """
    state = {"model": model.state_dict(), "mean": mean, "step": step, "seconds": seconds}
    torch.save(state | optimiser, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_average(name, work, model):
    """Puts the averaged weights of the latest checkpoint into `model`; returns its step."""
    state = torch.load(Path(work) / f"{name}.pt", weights_only=True)
    model.load_state_dict(state["model"])
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(trained, state["mean"], strict=True):
            parameter.copy_(value)
    model.eval()
    return state["step"]


def note(folder, **facts):
    """Adds facts about the training (steps, seconds, ...) to `folder/training.json`."""
    path = Path(folder) / "training.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | facts, indent=1, sort_keys=True) + "\n")


def images_to_torch(images_nhwc):
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(images_nhwc)).permute(0, 3, 1, 2).float() / 127.5 - 1
    )
