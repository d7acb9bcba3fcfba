"""The meaning of the values in label files.

Label files of the same set exist with different orders and offsets, and a mix-up looks like a bad
model. So a value that a rule does not know is an error, never background.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ovref.evaluation.metrics_semantic import IGNORE

_UNKNOWN = -2
_LARGEST = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """Maps the values of a label file to classes."""

    classes: Mapping[int, int]
    """Value -> class, a position in the class list. Several values may have the same class."""
    ignored: frozenset[int] = frozenset()
    """Values of pixels that are not evaluated."""
    others_ignored: bool = False
    """Whether all other values are ignored, too. Only for files with ids of far more classes than
    are evaluated; otherwise an unlisted value is an error."""
    bits: int = 8
    """Bits per value: 8 or 16. 8-bit files of a 16-bit set have lost classes."""

    def accepts(self, values: Iterable[int]) -> bool:
        """Whether all values are known."""
        return self.others_ignored or all(v in self.classes or v in self.ignored for v in values)

    def table(self) -> np.ndarray:
        """(65536,) int32: the label of each value; below IGNORE for an unknown value."""
        table = np.full(_LARGEST, IGNORE if self.others_ignored else _UNKNOWN, dtype=np.int32)
        table[list(self.ignored)] = IGNORE
        table[list(self.classes)] = list(self.classes.values())
        return table


def shifted(count: int, first: int = 0, ignored: Iterable[int] = (), bits: int = 8) -> LabelRule:
    """The rule for files whose classes are numbered from `first` without gaps."""
    return LabelRule(
        classes={first + index: index for index in range(count)},
        ignored=frozenset(ignored),
        bits=bits,
    )


def listed(
    ids: Iterable[int], ignored: Iterable[int] = (), others_ignored: bool = False, bits: int = 8
) -> LabelRule:
    """The rule for files whose classes have these ids, in the order of the class list."""
    return LabelRule(
        classes={value: index for index, value in enumerate(ids)},
        ignored=frozenset(ignored),
        others_ignored=others_ignored,
        bits=bits,
    )


def labels_of_values(values_hw: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(H, W) int32 classes, or IGNORE, of values in [0, 65535] by the table of a `LabelRule`.

    Raises:
        ValueError: there are unknown values; the message lists them.
    """
    label_hw = table[values_hw]
    if (label_hw == _UNKNOWN).any():
        wrong = np.unique(values_hw[label_hw == _UNKNOWN])
        raise ValueError(spans(wrong.tolist()))
    return label_hw


def spans(values: Iterable[int]) -> str:
    """Formats integers as `0-10, 12, 255`, with at most eight spans."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(texts[:8] + ["..."] * (len(texts) > 8))
