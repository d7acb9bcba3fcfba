"""What the values of a label file mean, and which set a file's values belong to.

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
    """The class of each value of a label file."""

    classes: Mapping[int, int]
    """Value -> class, a position in the class list. Several values may be of one class."""
    ignored: frozenset[int] = frozenset()
    """Values of pixels that are not evaluated."""
    others_ignored: bool = False
    """Whether every other value is ignored too. Only where the files hold ids of far more classes
    than are evaluated; otherwise a value that is not listed is an error."""
    bits: int = 8
    """Bits a value needs: 8 or 16. Eight-bit files of a 16-bit set have lost classes."""

    def accepts(self, values: Iterable[int]) -> bool:
        """Whether each value has a meaning."""
        return self.others_ignored or all(v in self.classes or v in self.ignored for v in values)

    def table(self) -> np.ndarray:
        """(65536,) int32: the label of each value, or a number below IGNORE."""
        table = np.full(_LARGEST, IGNORE if self.others_ignored else _UNKNOWN, dtype=np.int32)
        table[list(self.ignored)] = IGNORE
        table[list(self.classes)] = list(self.classes.values())
        return table


def shifted(count: int, first: int = 0, ignored: Iterable[int] = (), bits: int = 8) -> LabelRule:
    """The rule of files whose classes are numbered from `first` without gaps."""
    return LabelRule(
        classes={first + index: index for index in range(count)},
        ignored=frozenset(ignored),
        bits=bits,
    )


def listed(
    ids: Iterable[int], ignored: Iterable[int] = (), others_ignored: bool = False, bits: int = 8
) -> LabelRule:
    """The rule of files whose classes have the given ids, in the order of the class list."""
    return LabelRule(
        classes={value: index for index, value in enumerate(ids)},
        ignored=frozenset(ignored),
        others_ignored=others_ignored,
        bits=bits,
    )


def labels_of_values(values_hw: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(H, W) int32 classes, or IGNORE.

    Args:
        values_hw: (H, W) integers in [0, 65535].
        table: of `LabelRule.table`.

    Raises:
        ValueError: a value that the rule does not know; the message lists the values.
    """
    label_hw = table[values_hw]
    if (label_hw == _UNKNOWN).any():
        wrong = np.unique(values_hw[label_hw == _UNKNOWN])
        raise ValueError(spans(wrong.tolist()))
    return label_hw


def spans(values: Iterable[int]) -> str:
    """Integers for people: `0-10, 12, 255`; at most eight spans."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(texts[:8] + ["..."] * (len(texts) > 8))
