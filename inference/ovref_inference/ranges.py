"""Range checks of settings and arguments, with one wording for all."""

from typing import Any

STRICT = {"extra": "forbid", "strict": True}
"""Marks a dataclass of settings: unknown keys and values of another type are refused when it is
read from a file (`ovref.config`)."""
ADDED_LATER = {"fingerprint": "unless default"}
"""Metadata of a field that fingerprints leave out at its default (`ovref.identity`)."""


def require_at_least(name: str, value: Any, low: float) -> None:
    """Raises ValueError unless `value >= low`; NaN and None are refused."""
    if value is None or not value >= low:
        raise ValueError(f"{name} must be at least {low}, found {value}")


def require_above(name: str, value: Any, low: float) -> None:
    """Raises ValueError unless `value > low`; NaN and None are refused."""
    if value is None or not value > low:
        raise ValueError(f"{name} must be above {low}, found {value}")


def require_within(name: str, value: Any, low: float, high: float, ends: str = "[]") -> None:
    """Raises ValueError unless value is between low and high; NaN and None are refused.

    Args:
        name: of the setting or argument, for the message.
        ends: which ends are included, as in `[]`, `(]`, `[)` or `()`.
    """
    above = value is not None and (value > low if ends[0] == "(" else value >= low)
    below = value is not None and (value < high if ends[1] == ")" else value <= high)
    if not (above and below):
        raise ValueError(f"{name} must be in {ends[0]}{low}, {high}{ends[1]}, found {value}")


def require_each_at_least(name: str, values: Any, low: float) -> None:
    """Raises ValueError unless there are values and each is `>= low`."""
    if not values or not all(value >= low for value in values):
        raise ValueError(f"{name} must be one or more values of at least {low}, found {values}")


def require_one_of(name: str, value: Any, *choices: str) -> None:
    """Raises ValueError for any other value."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, found {value!r}")


def require_model(model: str) -> None:
    """Raises ValueError for an empty id."""
    if not model:
        raise ValueError("model must name a model, found an empty string")
