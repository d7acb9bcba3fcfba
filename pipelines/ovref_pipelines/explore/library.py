"""What the explorer shows, as plain values: a collection, and the build that it came from."""

import bisect
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ovref.contract import base_key
from ovref.errors import InputError, StorageError
from ovref.records import ImageRecord
from ovref.storage.file_store import Store
from ovref.storage.samples import Samples
from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_inference.collection import store as collections
from ovref_pipelines import live
from ovref_pipelines.explore.row_cache import RowCache
from ovref_pipelines.output import BuildOutput, open_build
from ovref_pipelines.verbs.status import status

COMPARED = 4096
"""References of a noun that are compared with each other at most, spread evenly over all."""
ODD = 3.0
"""A reference is suspicious if its agreement is so many median deviations below the median."""
SHOWN_NEIGHBOURS = 8
PROTOTYPE_REFERENCES = 4


@dataclass
class Opened:
    """A collection that is open, with what is kept of it. Replaced as a whole when it changes."""

    collection: ReferenceCollection
    table: RowCache
    by_count: list[int]
    """Rows of nouns, those of most references first."""
    ranked: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: list[pa.Table | None] = field(default_factory=list)
    """What the filters left out (`filtered`), once it has been read."""


class Library:
    """A build, a collection, or both. Safe for use by several threads."""

    def __init__(self, url: str, build: str | None = None) -> None:
        """
        Args:
            url: of a build's output or of a collection.
            build: output of the build that made the collection, for its images; None takes the
                folder that the collection is in, if it is one.

        Raises:
            InputError: neither a build nor a collection is at `url`.
            CollectionError: the collection cannot be opened.
        """
        self.build, self.collection_url = _places(url, build)
        self.url = url
        self._lock = threading.RLock()
        self._opened: Opened | None = None
        self._samples: tuple[str, Samples] | None = None
        if self.is_published:
            self.open()

    @property
    def is_published(self) -> bool:
        """Whether there is a collection yet."""
        return _is_collection(self.collection_url)

    def open(self) -> Opened:
        """The collection, opened when it is first asked for.

        Raises:
            InputError: the build has none yet.
        """
        with self._lock:
            if self._opened is None:
                if not self.is_published:
                    raise InputError("there is no collection yet: the build is not done")
                self._opened = self._open()
            return self._opened

    def reopen(self) -> None:
        """Opens it anew, after it has changed. Who still reads the old one may finish."""
        with self._lock:
            self._opened = self._open()

    def _open(self) -> Opened:
        collection = ReferenceCollection.open(self.collection_url)
        _, paths = collections.fetch(self.collection_url)
        counts = collection.noun_counts
        order = np.lexsort((np.arange(len(counts)), -counts))
        opened = Opened(collection, RowCache(paths["references"]), order.tolist())
        # What is read when it is first needed is read now, so that no page waits for it.
        collection.noun_rows(np.zeros(1, np.int64))
        for name in collection.nouns[:1]:
            collection.references_of(name)
            self._noun_neighbours(collection, name)
        return opened

    # -- what is there -------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What lies here, for the head of the page."""
        found: dict[str, Any] = {
            "url": self.url,
            "build": None if self.build is None else self.build.store.url,
            "collection": self.collection_url if self.is_published else None,
        }
        if self.is_published:
            manifest = self.open().collection.manifest
            found |= {
                "fingerprint": manifest.fingerprint,
                "counts": manifest.counts,
                "visual": manifest.visual.model,
                "textual": manifest.textual.model,
                "licences": list(manifest.licences),
                "has_images": self.build is not None and self.build.has("images"),
            }
        return found

    def progress(self) -> dict[str, Any]:
        """Where the build stands: `progress.json` and the counts of its steps."""
        if self.build is None:
            raise InputError(f"{self.url} is a collection without its build: it makes no progress")
        return {
            "now": live.read(self.build.store),
            "steps": [asdict(step) for step in status(self.build)],
            "published": self.is_published,
        }

    def nouns(self, text: str, order: str, start: int, count: int) -> dict[str, Any]:
        """A page of the vocabulary: nouns that contain `text`, those that begin with it first."""
        opened = self.open()
        names, counts = opened.collection.nouns, opened.collection.noun_counts
        text = text.strip().lower()
        rows: Sequence[int] = range(len(names))
        if order == "count":
            rows = opened.by_count
        if text:
            rows = [row for row in rows if text in names[row]]
            rows.sort(key=lambda row: not names[row].startswith(text))
        page = rows[start : start + count]
        return {
            "total": len(rows),
            "nouns": [{"noun": names[row], "count": int(counts[row])} for row in page],
        }

    def noun(self, name: str, order: str, start: int, count: int) -> dict[str, Any]:
        """A noun and a page of its references.

        Args:
            order: `suspicious` (least agreement with the noun's other references first), `typical`,
                or `id`.

        Raises:
            InputError: the vocabulary does not have it.
        """
        opened = self.open()
        collection = opened.collection
        _row(collection, name)
        ranked = self._ranked(opened, name)
        ids, agreement = ranked["ids"], ranked["agreement"]
        if order == "id":
            by = np.argsort(ids)
        else:
            by = np.argsort(agreement if order == "suspicious" else -agreement, kind="stable")
        page = by[start : start + count]
        return {
            "noun": name,
            "count": len(collection.references_of(name)),
            "compared": len(ids),
            "suspicious": int(ranked["odd"].sum()),
            "tightness": float(agreement.mean()) if len(ids) else None,
            "neighbours": ranked["neighbours"],
            "references": self.references(
                ids[page].tolist(),
                agreement={int(ids[i]): float(agreement[i]) for i in page},
                odd={int(ids[i]) for i in page if ranked["odd"][i]},
            ),
        }

    def references(
        self, ids: list[int], *, agreement: dict[int, float] | None = None, odd: Any = ()
    ) -> list[dict[str, Any]]:
        """What is known of references, for tiles."""
        rows = self.open().table.rows(ids) if ids else []
        return [
            {
                "id": row["id"], "noun": row["noun"], "caption": row["caption"],
                "span": [row["span_start"], row["span_end"]], "score": round(row["score"], 3),
                "area": round(row["area"], 4), "source": row["source"], "key": row["key"],
                "agreement": None if agreement is None else round(agreement[row["id"]], 3),
                "suspicious": row["id"] in odd,
            }
            for row in rows
        ]  # fmt: skip

    def reference(self, number: int) -> dict[str, Any]:
        """One reference, the references that look like it, and the nouns of its image.

        Raises:
            InputError: the collection has no such reference.
        """
        opened = self.open()
        self._check_id(opened, number)
        (row,) = opened.table.rows([number])
        vector = np.asarray(opened.collection.visual[number], np.float32)
        near: list[dict[str, Any]] = []
        if np.linalg.norm(vector) > 0:
            support = opened.collection.search_regions(vector[None], k=SHOWN_NEIGHBOURS + 1)
            ids = [int(i) for i in support.ids[0] if i >= 0]
            cosine = dict(zip(ids, support.scores[0].tolist(), strict=False))
            others = self.references([i for i in ids if i != number][:SHOWN_NEIGHBOURS])
            near = [one | {"cosine": round(cosine[one["id"]], 3)} for one in others]
        return {
            "row": row,
            "neighbours": near,
            "same_noun": sum(one["noun"] == row["noun"] for one in near),
            "image": self.siblings(number, row),
        }

    def siblings(self, number: int, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The references of the same image, which stand beside each other in the table."""
        opened = self.open()
        key, total = base_key(row["key"]), len(opened.collection.visual)
        around = range(max(0, number - 16), min(total, number + 17))
        same = [one for one in opened.table.rows(around) if base_key(one["key"]) == key]
        return [
            {"id": one["id"], "noun": one["noun"], "span": [one["span_start"], one["span_end"]]}
            for one in same
        ]

    def prototypes(self, name: str) -> list[dict[str, Any]]:
        """The prototypes of a noun, each with its nearest references.

        Raises:
            InputError: the vocabulary does not have it.
        """
        opened = self.open()
        _row(opened.collection, name)
        found = opened.collection.prototypes([name])
        vectors_kd = found.vectors_nkd[0][: found.counts[0]]
        vectors_kd = vectors_kd[np.linalg.norm(vectors_kd, axis=1) > 0]
        if not len(vectors_kd):
            return []
        support = opened.collection.search_regions(vectors_kd, k=PROTOTYPE_REFERENCES)
        return [
            {
                "prototype": number,
                "made_of": list(found.nouns[0]),
                "references": [
                    one | {"cosine": round(float(score), 3)}
                    for one, score in zip(
                        self.references([int(i) for i in ids if i >= 0]), scores, strict=False
                    )
                ],
            }
            for number, (ids, scores) in enumerate(zip(support.ids, support.scores, strict=True))
        ]

    # -- pictures ------------------------------------------------------------------------------

    def image(self, number: int) -> tuple[ImageRecord, int]:
        """The image of a reference, and the number of its region.

        Raises:
            InputError: there is no such reference, or the build that made its image is not here.
            StorageError: the image's shard is damaged.
        """
        opened = self.open()
        self._check_id(opened, number)
        (row,) = opened.table.rows([number])
        return self.image_of(row["shard"], row["key"])

    def image_of(self, made_in: str, key: str) -> tuple[ImageRecord, int]:
        """The image of a reference by its columns `shard` and `key`. Errors like `image`."""
        made_by, _, shard = made_in.partition("/")
        record = self._images(made_by).get(shard, base_key(key))
        region = int(key.rpartition("#")[2])
        if not isinstance(record, ImageRecord) or region >= len(record.regions):
            raise StorageError(f"shard {shard} has no region {region} of {record.key}")
        return record, region

    def _images(self, made_by: str) -> Samples:
        with self._lock:
            if self.build is None or not self.build.has("images"):
                raise InputError(
                    "there are no images: a collection has none of its own, and its build is not "
                    "here; name its output with --build"
                )
            if self._samples is None:
                fingerprint = self.build.step("references").fingerprint
                self._samples = fingerprint, Samples(self.build.step("images"))
            fingerprint, samples = self._samples
        if not fingerprint.startswith(made_by):
            raise InputError("another build made this reference, and its images are not here")
        return samples

    # -- how it is done ------------------------------------------------------------------------

    def _check_id(self, opened: Opened, number: int) -> None:
        if not 0 <= number < len(opened.collection.visual):
            raise InputError(f"the collection has no reference {number}")

    def _ranked(self, opened: Opened, name: str) -> dict[str, Any]:
        """Ids of a noun's references, their agreement, and which are suspicious; its neighbours."""
        if name in opened.ranked:
            return opened.ranked[name]
        ids = opened.collection.references_of(name)
        if len(ids) > COMPARED:
            ids = ids[np.linspace(0, len(ids) - 1, COMPARED).astype(int)]
        agreement, odd = agreement_of(np.asarray(opened.collection.visual[ids], np.float32))
        near = self._noun_neighbours(opened.collection, name)
        found = {"ids": ids, "agreement": agreement, "odd": odd, "neighbours": near}
        if len(opened.ranked) > 256:
            opened.ranked.clear()
        opened.ranked[name] = found
        return found

    def _noun_neighbours(self, collection: ReferenceCollection, name: str) -> list[dict[str, Any]]:
        """Nouns whose text embeddings are nearest."""
        row, counts = _row(collection, name), collection.noun_counts
        cosines = collection.noun_embeddings @ collection.noun_embeddings[row]
        count = min(SHOWN_NEIGHBOURS + 1, len(cosines))
        near = np.argpartition(-cosines, count - 1)[:count]
        near = near[np.argsort(-cosines[near])]
        return [
            {"noun": collection.nouns[i], "cosine": round(float(cosines[i]), 3),
             "count": int(counts[i])}
            for i in near.tolist() if i != row
        ]  # fmt: skip


def agreement_of(vectors_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well each of a noun's references agrees with the others.

    Args:
        vectors_nd: (n, d) float32 visual embeddings.

    Returns:
        (n,) cosines to the mean of the others, 1 for a single one; and (n,) bool, which are
        suspicious: more than `ODD` median deviations below the median.
    """
    count = len(vectors_nd)
    if count < 2:
        return np.ones(count), np.zeros(count, bool)
    others_nd = vectors_nd.sum(0) - vectors_nd
    norms = np.linalg.norm(others_nd, axis=1) * np.linalg.norm(vectors_nd, axis=1)
    agreement = (others_nd * vectors_nd).sum(1) / np.maximum(norms, 1e-12)
    middle = np.median(agreement)
    # 1.4826 makes the median deviation of a normal distribution its standard deviation.
    limit = middle - ODD * 1.4826 * np.median(np.abs(agreement - middle))
    return agreement, (agreement < limit) & (count > 4)


def _row(collection: ReferenceCollection, name: str) -> int:
    """The row of a noun. Raises InputError where the vocabulary does not have it."""
    row = bisect.bisect_left(collection.nouns, name)
    if row == len(collection.nouns) or collection.nouns[row] != name:
        raise InputError(f"the vocabulary has no noun {name!r}")
    return row


def _is_collection(url: str) -> bool:
    """Whether a collection is there. Of the Hub nothing else is opened."""
    return url.startswith(hub.PREFIX) or Store.open(url).exists(fmt.MANIFEST)


def _places(url: str, build: str | None) -> tuple[BuildOutput | None, str]:
    """The build, and where the collection is or will be."""
    if _is_collection(url):
        if build is not None:
            return open_build(build), url
        if url.startswith(hub.PREFIX):
            return None, url
        parent = Store.open(url).url.rstrip("/").rpartition("/")[0]
        try:
            found = open_build(parent) if parent else None
        except (InputError, StorageError):
            found = None
        return found, url
    found = open_build(url)
    return found, found.collection.url
