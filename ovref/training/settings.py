"""How long, how fast and how exactly a head is trained: plain data, and the rate of each step."""

import re
from dataclasses import dataclass
from typing import Literal

from ovref.config import STRICT
from ovref_inference.ranges import require_above, require_at_least, require_within


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are trained at a rate of their own."""

    __pydantic_config__ = STRICT

    pattern: str
    """Regular expression that is found in the names of these parameters; an empty one is found in
    all. A parameter belongs to the first group whose pattern fits."""
    rate: float = 1.0
    """Multiplier of the learning rate."""
    decay: float | None = None
    """Weight decay; null takes that of all others."""

    def __post_init__(self) -> None:
        require_at_least("rate", self.rate, 0)
        if self.decay is not None:
            require_at_least("decay", self.decay, 0)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression, found {self.pattern!r}: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the loop (`ovref.training.loop`), with AdamW."""

    __pydantic_config__ = STRICT

    steps: int
    """Steps of the optimiser in all."""
    batch: int = 16
    """Images of a step, over all workers and accumulated parts."""
    accumulate: int = 1
    """Parts that a worker's images of a step are processed in, one after another, to need less
    memory; changes last bits alone, where nothing is dropped at random."""
    rate: float = 2e-5
    """Highest learning rate."""
    least_rate: float = 0.0
    """Learning rate below which a schedule does not fall."""
    schedule: Literal["poly", "step", "constant"] = "poly"
    """`poly`: (1 - step / steps) ** power. `step`: times `drop` at each of `milestones`."""
    power: float = 0.9
    """Exponent of `poly`."""
    milestones: tuple[int, ...] = ()
    """Steps at which `step` lowers the rate."""
    drop: float = 0.1
    """Factor of `step`."""
    warm_up: int = 0
    """First steps, over which the rate rises from nearly nothing in equal amounts."""
    decay: float = 0.01
    """Weight decay."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with rates or decays of their own."""
    clip_norm: float | None = None
    """Gradients of a larger norm are scaled to this one; null leaves them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the arithmetic; weights, their gradients and the losses stay float32."""
    seed: int = 0
    """Seed of new weights, of the order of images, of crops and of what is dropped."""
    save_every: int = 1000
    """Steps between checkpoints, which is what a kill can cost at most. The newest is kept, and the
    one of half the steps."""
    log_every: int = 50
    """Steps whose mean loss is one row of the history."""
    tensorboard: bool = False
    """Whether the history is also written for TensorBoard, into the output's folder `tensorboard`;
    needs the package `tensorboard`, and a local output."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "log_every"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("warm_up", "decay", "power", "seed"):
            require_at_least(name, getattr(self, name), 0)
        require_above("rate", self.rate, 0)
        require_within("least_rate", self.least_rate, 0, self.rate)
        require_within("drop", self.drop, 0, 1, "(]")
        if self.clip_norm is not None:
            require_above("clip_norm", self.clip_norm, 0)
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch, found {self.accumulate} and {self.batch}"
            )
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError("give milestones with schedule step, and with no other")

    @property
    def middle(self) -> int:
        """The step whose checkpoint is kept for good, with which a transductive training begins."""
        return self.steps // 2

    def hours_text(self, seconds: float, device: str) -> str:
        """For people: how long the training takes if one image takes `seconds`."""
        hours = seconds * self.steps * self.batch / 3600
        return (
            f"one image forward and backward: {seconds:.1f} s on {device}; {self.steps} steps of "
            f"{self.batch} images one by one: {hours:.1f} hours"
        )


UNCOUNTED = ("accumulate", "save_every", "log_every", "tensorboard")
"""Fields of `TrainingConfig` that may change when a training is resumed."""

WARM_UP_FROM = 1e-6
"""Share of its rate that a warm-up begins with, as in mmsegmentation."""


def rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step, counted from 0, as mmsegmentation has it."""
    if config.schedule == "poly":
        left = (1 - step / config.steps) ** config.power
        rate = config.least_rate + (config.rate - config.least_rate) * left
    elif config.schedule == "step":
        passed = sum(step >= milestone for milestone in config.milestones)
        rate = max(config.least_rate, config.rate * config.drop**passed)
    else:
        rate = config.rate
    if step < config.warm_up:
        rate *= 1 - (1 - step / config.warm_up) * (1 - WARM_UP_FROM)
    return rate
