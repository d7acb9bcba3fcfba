"""Near-duplicates among captions: the same nouns, and nearly the same words.

Captions from web pages repeat each other with a word exchanged or added, which the comparison of
whole captions in `ovref.ingest` does not find. Two captions are near-duplicates if they have the
same set of nouns and the Jaccard similarity of their sets of words (words in common over words of
either) reaches a threshold. So no caption is lost that has another noun, whatever the rest says.

Candidates are found by MinHash (Broder 1997) with banding (Leskovec, Rajaraman and Ullman, Mining
of Massive Datasets, 3.4) and then compared by their words, so that two captions never count as
near-duplicates by chance; a few near-duplicates are missed (`BANDS`). Memory is allocated at the
beginning: 4 bytes per slot, and the hashed words of each caption that was added.
"""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np

BANDS, BAND_ROWS = 5, 2
"""Two captions of similarity s are compared if the minima of `BAND_ROWS` hash functions agree in
one of `BANDS` bands, whose probability is 1 - (1 - s**2)**5: 0.9998 at 0.9, 0.994 at 0.8, 0.966 at
0.7 and 0.76 at 0.5."""
SLOTS_PER_CAPTION = 8
"""Three of eight slots stay empty."""
PROBES = 32
"""Slots looked at per band. A noun's most frequent phrases fill their neighbourhood; captions
beyond that are found by their other bands."""
_LOW = 0xFFFFFFFF
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is compared of one caption."""

    nouns: int
    """32-bit hash of the set of nouns."""
    words: frozenset[int]
    """32-bit hashes of the words."""
    places: tuple[int, ...]
    """First slot of each band."""


class NearCaptions:
    """The captions that were added, for finding near-duplicates of further ones.

        near = NearCaptions(2, 0.8)
        for sketch in near.sketches(["a cat on a mat", "a cat on the mat"], [["cat"], ["cat"]]):
            if not near.has(sketch):
                near.add(sketch)
    """

    def __init__(self, captions: int, similarity: float) -> None:
        """
        Args:
            captions: maximum number of captions that will be added; memory is allocated for all
                of them.
            similarity: lowest Jaccard similarity of near-duplicates, in (0, 1].
        """
        self._similarity = similarity
        self._slots = array("I", [0]) * (SLOTS_PER_CAPTION * max(1, captions) + PROBES)
        self._nouns = array("I")
        self._starts = array("Q", [0])
        self._words = array("I")

    def sketches(self, captions: Sequence[str], nouns: Sequence[Sequence[str]]) -> list[Sketch]:
        """One sketch per caption.

        Args:
            captions: the texts; letter case and the order of words do not matter.
            nouns: of each caption, in any order.
        """
        if not captions:
            return []
        words = [sorted({_hashed(word) for word in _words(text)}) for text in captions]
        nouns_n = np.array([_hash(" ".join(sorted(set(some)))) for some in nouns], np.uint64)
        lengths = np.array([len(some) for some in words])
        starts = np.cumsum(lengths) - lengths
        flat = np.array([word for some in words for word in some], np.uint64)
        places_nb = np.empty((len(captions), BANDS), np.uint64)
        for band in range(BANDS):
            key_n = nouns_n
            for row in range(BAND_ROWS):
                lowest_n = np.minimum.reduceat(_mixed(flat + _seed(band, row)), starts)
                key_n = _mixed(key_n ^ lowest_n)
            places_nb[:, band] = key_n % np.uint64(len(self._slots) - PROBES)
        return [
            Sketch(int(noun) & _LOW, frozenset(word & _LOW for word in some), tuple(places))
            for noun, some, places in zip(nouns_n, words, places_nb.tolist(), strict=True)
        ]

    def has(self, sketch: Sketch) -> bool:
        """Whether a near-duplicate was added before."""
        seen: set[int] = set()
        for place in sketch.places:
            for slot in range(place, place + PROBES):
                number = self._slots[slot]
                if not number:
                    break
                if self._nouns[number - 1] != sketch.nouns or number in seen:
                    continue
                seen.add(number)
                start, stop = self._starts[number - 1], self._starts[number]
                common = len(sketch.words.intersection(self._words[start:stop]))
                either = len(sketch.words) + stop - start - common
                if common >= self._similarity * either:
                    return True
        return False

    def add(self, sketch: Sketch) -> None:
        """Adds a caption to those that further ones are compared with."""
        self._nouns.append(sketch.nouns)
        self._words.extend(sorted(sketch.words))
        self._starts.append(len(self._words))
        for place in sketch.places:
            for slot in range(place, place + PROBES):
                if not self._slots[slot]:
                    self._slots[slot] = len(self._nouns)
                    break


def _words(text: str) -> list[str]:
    """The words of a caption, or the whole caption where it has none."""
    return _WORD.findall(text.lower()) or [text]


@lru_cache(1 << 18)
def _hashed(word: str) -> int:
    return _hash(word)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _seed(band: int, row: int) -> np.uint64:
    return np.uint64((band * BAND_ROWS + row + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers in which each bit depends on all (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
