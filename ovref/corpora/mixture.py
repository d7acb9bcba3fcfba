"""Several corpora as one: a YAML file that lists them, each with its weight.

    corpora:
      - {path: captions_train2017.json, weight: 3, licence: CC-BY-4.0}
      - {path: "s3://bucket/cc12m/*.parquet", caption_column: TEXT}

Captions alternate, so that those read from each corpus are at any moment in the proportion of the
weights, until it ends and the others go on. So a build with a `limit`, or one that is stopped
early, has its share of each. Relative paths are relative to the file.
"""

import heapq
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from typing import Any

import yaml

from ovref.config import STRICT, load_tree
from ovref.contract import Dropped
from ovref.corpora.listing import open_place, shown
from ovref.corpora.spec import MINIATURE, CorpusSpec, is_mixture
from ovref.errors import ConfigError, InputError
from ovref.licences import UNKNOWN
from ovref_inference.places import describe, store_errors
from ovref_inference.ranges import require_within

_OF_THE_WHOLE = ("draws", "max_characters", "repeats", "labels")
"""Settings that a listed corpus takes from the mixture."""
_OF_EACH = ("images", "caption_column", "image_column", "corpus_id")
"""Settings that a mixture has none of its own of."""


@dataclass(frozen=True, kw_only=True)
class WeightedCorpus(CorpusSpec):
    """One of the corpora in the list."""

    __pydantic_config__ = STRICT

    weight: float = 1.0
    """Captions read of this corpus for each one of a corpus with the weight 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within("weight", self.weight, 0, float("inf"), "()")
        for field in fields(CorpusSpec):
            if field.name in _OF_THE_WHOLE and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is set for the whole mixture, not for one corpus")
        if is_mixture(self):
            raise ValueError(f"a listed corpus must not be a list itself, found {self.path}")


@dataclass(frozen=True, kw_only=True)
class _Mixture:
    __pydantic_config__ = STRICT

    corpora: tuple[WeightedCorpus, ...]


def corpora_of(spec: CorpusSpec) -> list[tuple[CorpusSpec, float]]:
    """The corpora of a mixture, with the settings of the whole, and their weights.

    Raises:
        InputError: the list cannot be read, or is no list of corpora.
    """
    for field in fields(CorpusSpec):
        if field.name in _OF_EACH and getattr(spec, field.name) != field.default:
            raise InputError(
                f"{field.name} is set for each corpus that {shown(spec.path)} lists, not for all"
            )
    fs, path = open_place(spec.path)
    try:
        tree = yaml.safe_load(fs.cat_file(path).decode("utf-8"))
        if not isinstance(tree, dict):
            raise InputError(f"{path} must hold a list of `corpora`, found {type(tree).__name__}")
        corpora = load_tree(_Mixture, tree, path).corpora
    except (UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
        raise InputError(f"cannot read the corpora listed in {path}: {error}") from error
    except store_errors() as error:
        raise InputError(f"cannot read {shown(spec.path)}: {describe(error)}") from error
    if not corpora:
        raise InputError(f"{path} lists no corpus")
    folder = spec.path.rpartition("/")[0]
    found = []
    for one in corpora:
        settings = {field.name: getattr(one, field.name) for field in fields(CorpusSpec)}
        settings |= {name: getattr(spec, name) for name in _OF_THE_WHOLE}
        for name in ("path", "images"):
            if settings[name] is not None:
                settings[name] = _beside(folder, settings[name])
        try:
            found.append((CorpusSpec(**settings), one.weight))
        except ValueError as error:
            raise InputError(f"{path}, corpus {one.path}: {error}") from error
    return found


def interleaved(
    streams: Sequence[Generator[Any, None, None]], weights: Sequence[float]
) -> Generator[Any, None, None]:
    """Records of several corpora in the proportion of the weights; drops do not count."""
    taken = [0] * len(streams)
    waiting = [(1 / weight, number) for number, weight in enumerate(weights)]
    heapq.heapify(waiting)
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(closing(stream))
        while waiting:
            _, number = heapq.heappop(waiting)
            for record in streams[number]:
                yield record
                if not isinstance(record, Dropped):
                    taken[number] += 1
                    heapq.heappush(waiting, ((taken[number] + 1) / weights[number], number))
                    break


def licences_of_corpus(spec: CorpusSpec) -> tuple[str, ...]:
    """The licence that is stated for a corpus, or those of a mixture's corpora, each once. UNKNOWN
    stands for corpora without one, if others have one; empty if none has."""
    if spec.licence is not None or not is_mixture(spec):
        return () if spec.licence is None else (spec.licence,)
    stated = [one.licence for one, _ in corpora_of(spec)]
    if not any(stated):
        return ()
    return tuple(dict.fromkeys(licence or UNKNOWN for licence in stated))


def _beside(folder: str, place: str) -> str:
    if "://" in place or place.startswith(("/", "~", MINIATURE)) or not folder:
        return place
    return f"{folder}/{place}"
