"""A sorted vocabulary in the memory of an Arrow array, without a Python object for each word."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_AT_A_TIME = 4096


class Words(Sequence[str]):
    """Texts in ascending order, each once. Reads like a list of them; `in` and `index` look by
    halves. A word takes its UTF-8 bytes and four more."""

    def __init__(self, array: pa.StringArray) -> None:
        """
        Args:
            array: sorted, without repetitions or nulls; see `are_sorted`.
        """
        _, ends, text = array.buffers()
        # Python reads bytes several times faster than a buffer of Arrow.
        self._text = text.to_pybytes() if text else b""
        ends = ends or pa.py_buffer(bytes(4))
        self._ends = memoryview(ends).cast("i")[array.offset :]
        self._size, text = len(array), pa.py_buffer(self._text)
        self.array = pa.StringArray.from_buffers(self._size, ends, text, offset=array.offset)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, key: int, /) -> str: ...
    @overload
    def __getitem__(self, key: slice, /) -> list[str]: ...

    def __getitem__(self, key: Any, /) -> Any:
        if isinstance(key, slice):
            return [self[at] for at in range(*key.indices(len(self)))]
        at = key if 0 <= key < self._size else range(self._size)[key]
        return self._text[self._ends[at] : self._ends[at + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_A_TIME):
            yield from self.array.slice(start, _AT_A_TIME).to_pylist()

    def __contains__(self, word: object) -> bool:
        return self.find(word) is not None

    def __eq__(self, other: object) -> bool:
        """Whether the other one, `Words` or a list, has the same words."""
        if isinstance(other, Words):
            return bool(self.array.equals(other.array))
        return list(self) == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Words, (self.array,)  # what it reads by cannot be pickled

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"Words({len(self)}: {shown}{', ...' if len(self) > 3 else ''})"

    def find(self, word: object) -> int | None:
        """Where the word is; None if it is not there."""
        if not isinstance(word, str):
            return None
        # Texts are in the order of their bytes in UTF-8.
        text, ends, wanted = self._text, self._ends, word.encode("utf-8", "surrogatepass")
        low, high = 0, self._size
        while low < high:
            middle = (low + high) // 2
            if text[ends[middle] : ends[middle + 1]] < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < self._size and self[low] == word else None

    def index(self, word: Any, start: int = 0, stop: int | None = None) -> int:
        """Where the word is. Raises ValueError if it is not there, or not in [start, stop)."""
        at = self.find(word)
        if at is None or at not in range(*slice(start, stop).indices(len(self))):
            raise ValueError(f"{word!r} is not in the list")
        return at

    def rows_of(self, words: pa.StringArray) -> np.ndarray:
        """(n,) int32: where each of these words is; -1 where it is not there."""
        found: np.ndarray = pc.index_in(words, value_set=self.array).fill_null(-1).to_numpy()
        return found


def find_in(words: Sequence[str], word: str) -> int | None:
    """Where the word is in a sorted sequence; None if it is not there."""
    if isinstance(words, Words):
        return words.find(word)
    at = bisect_left(words, word)
    return at if at < len(words) and words[at] == word else None


def are_sorted(array: pa.StringArray) -> bool:
    """Whether the words ascend, each once, without nulls."""
    ascend = pc.all(pc.less(array[:-1], array[1:]), min_count=0).as_py()
    return bool(ascend and not array.null_count)


def repeated(array: pa.StringArray) -> list[str]:
    """The words of a sorted array that are there more than once."""
    found: list[str] = array[1:].filter(pc.equal(array[1:], array[:-1])).unique().to_pylist()
    return found
