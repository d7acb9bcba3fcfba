"""The explorer's data as plain values: a collection and the build that made it."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ovref.contract import base_key, part_of_key
from ovref.errors import InputError, StorageError
from ovref.exchange.picture_files import Picture, PublishedPictures, has_pictures, picture_of
from ovref.ops.quality import agreement_with_others
from ovref.records import ImageRecord
from ovref.storage.file_store import Store
from ovref.storage.samples import Samples
from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_inference.collection import store as collections
from ovref_inference.vectors import prefetch_rows
from ovref_pipelines import live
from ovref_pipelines.explore.row_cache import RowCache
from ovref_pipelines.output import BuildOutput, is_collection, open_build
from ovref_pipelines.verbs.status import status

COMPARED = 4096
"""Maximum number of references of a noun that are compared with each other, an even sample of
all."""
SHOWN_NEIGHBOURS = 8
PROTOTYPE_REFERENCES = 4


@dataclass
class Opened:
    """An open collection with cached data. Replaced as a whole when the collection changes."""

    collection: ReferenceCollection
    table: RowCache
    by_count: list[int]
    """Rows of nouns by descending number of references."""
    ranked: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: list[pa.Table | None] = field(default_factory=list)
    """References that the filters dropped (`filtered`), once read."""


class Library:
    """A build, a collection, or both. Thread-safe."""

    def __init__(self, url: str, build: str | None = None) -> None:
        """
        Args:
            url: of a build's output or of a collection.
            build: output of the build that made the collection, for its images; None uses the
                collection's parent folder, if that is a build.

        Raises:
            InputError: neither a build nor a collection is at `url`.
            CollectionError: the collection cannot be opened.
        """
        self.build, self.collection_url = _places(url, build)
        self.url = url
        self._lock = threading.RLock()
        self._opened: Opened | None = None
        self._samples: tuple[str, Samples] | None = None
        self._beside: PublishedPictures | None = None
        """The images that were published with the collection, where there is no build."""
        if self.is_published:
            self.open()
            if self.build is None and has_pictures(self.collection_url):
                self._beside = PublishedPictures(self.collection_url)

    @property
    def is_published(self) -> bool:
        """Whether there is a collection yet."""
        return is_collection(self.collection_url)

    def open(self) -> Opened:
        """The collection, opened on first access.

        Raises:
            InputError: the build has no collection yet.
        """
        with self._lock:
            if self._opened is None:
                if not self.is_published:
                    raise InputError("there is no collection yet: the build has not finished")
                self._opened = self._open()
            return self._opened

    def reopen(self) -> None:
        """Opens the collection again after a change. Threads that still read the old one may
        finish."""
        with self._lock:
            self._opened = self._open()

    def _open(self) -> Opened:
        collection = ReferenceCollection.open(self.collection_url)
        table = RowCache(_tables(self.collection_url))
        order = np.argsort(-collection.noun_counts, kind="stable")
        opened = Opened(collection, table, order.tolist())
        # Preloads lazily read data, so that no page has to wait for it.
        collection.noun_rows(np.zeros(1, np.int64))
        for name in collection.nouns[:1]:
            collection.references_of(name)
            self._noun_neighbours(collection, name)
        return opened

    # -- what is there -------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """Description of the place, for the head of the page."""
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
                "has_images": self._beside is not None
                or (self.build is not None and self.build.has("images")),
            }
        return found

    def progress(self) -> dict[str, Any]:
        """Progress of the build: `progress.json` and the counts of its steps."""
        if self.build is None:
            raise InputError(f"{self.url} is a collection without its build: it has no progress")
        return {
            "now": live.read(self.build.store),
            "steps": [asdict(step) for step in status(self.build)],
            "published": self.is_published,
        }

    def nouns(self, text: str, order: str, start: int, count: int) -> dict[str, Any]:
        """A page of the vocabulary: nouns that contain `text`, those starting with it first."""
        opened = self.open()
        names, counts = opened.collection.nouns, opened.collection.noun_counts
        text = text.strip().lower()
        rows: Sequence[int] = range(len(names))
        if order == "count":
            rows = opened.by_count
        if text:
            has = pc.match_substring(names.array, text).to_pylist()
            rows = [row for row in rows if has[row]]
            rows.sort(key=lambda row: not names[row].startswith(text))
        page = rows[start : start + count]
        return {
            "total": len(rows),
            "nouns": [{"noun": names[row], "count": int(counts[row])} for row in page],
        }

    def noun(self, name: str, order: str, start: int, count: int) -> dict[str, Any]:
        """A noun and a page of its references.

        Args:
            order: `suspicious` (lowest agreement with the noun's other references first),
                `typical`, or `id`.

        Raises:
            InputError: it is not in the vocabulary.
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
        """Data of references, for tiles."""
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

    def similar(self, ids: Sequence[int], cosines: Sequence[float]) -> list[dict[str, Any]]:
        """`references` with their `cosine` to what they were searched by, without ids of -1."""
        known = {number: one for number, one in zip(ids, cosines, strict=True) if number >= 0}
        found = self.references(list(known))
        return [one | {"cosine": round(known[one["id"]], 3)} for one in found]

    def reference(self, number: int) -> dict[str, Any]:
        """One reference, the most similar references, and the nouns of its image.

        Raises:
            InputError: the collection has no such reference.
        """
        opened, row = self.open(), self._row_of(number)
        vector = np.asarray(opened.collection.visual[number], np.float32)
        near: list[dict[str, Any]] = []
        if np.linalg.norm(vector) > 0:
            support = opened.collection.search_regions(vector[None], k=SHOWN_NEIGHBOURS + 1)
            found = self.similar(support.ids[0].tolist(), support.scores[0].tolist())
            near = [one for one in found if one["id"] != number][:SHOWN_NEIGHBOURS]
        return {
            "row": row,
            "neighbours": near,
            "same_noun": sum(one["noun"] == row["noun"] for one in near),
            "image": self.siblings(number, row),
        }

    def siblings(self, number: int, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The references of the same image, which are adjacent in the table; of a partitioned
        collection, those in the same partition."""
        opened = self.open()
        key, around = base_key(row["key"]), np.arange(number - 16, number + 17)
        around = around[opened.collection.has(around)]
        same = [one for one in opened.table.rows(around.tolist()) if base_key(one["key"]) == key]
        return [
            {"id": one["id"], "noun": one["noun"], "span": [one["span_start"], one["span_end"]]}
            for one in same
        ]

    def prototypes(self, name: str) -> list[dict[str, Any]]:
        """The prototypes of a noun, each with its nearest references.

        Raises:
            InputError: it is not in the vocabulary.
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
                "references": self.similar(ids.tolist(), scores.tolist()),
            }
            for number, (ids, scores) in enumerate(zip(support.ids, support.scores, strict=True))
        ]

    # -- pictures ------------------------------------------------------------------------------

    def image(self, number: int) -> Picture:
        """The picture of a reference.

        Raises:
            InputError: the reference does not exist, or the build that made its image is not
                available.
            StorageError: the image's shard is damaged.
        """
        row = self._row_of(number)
        return self.image_of(row["shard"], row["key"])

    def image_of(self, made_in: str, key: str) -> Picture:
        """The picture of a reference by its columns `shard` and `key`. Errors like `image`."""
        if self._beside is not None:
            for _, found in self._beside.pictures([key]):
                return found
            raise InputError("the image of this reference was not published with the collection")
        made_by, _, shard = made_in.partition("/")
        record = self._images(made_by).get(shard, base_key(key))
        if not isinstance(record, ImageRecord) or part_of_key(key) >= len(record.regions):
            raise StorageError(f"shard {shard} has no region {part_of_key(key)} of {record.key}")
        return picture_of(record, key)

    def _images(self, made_by: str) -> Samples:
        with self._lock:
            if self.build is None or not self.build.has("images"):
                raise InputError(
                    "there are no images: they are in the output of the collection's build, which "
                    "is not here; give it with --build"
                )
            if self._samples is None:
                fingerprint = self.build.step("references").fingerprint
                self._samples = fingerprint, Samples(self.build.step("images"))
            fingerprint, samples = self._samples
        if not fingerprint.startswith(made_by):
            raise InputError("another build made this reference, and its images are not available")
        return samples

    # -- internals -----------------------------------------------------------------------------

    def _row_of(self, number: int) -> dict[str, Any]:
        opened = self.open()
        if not 0 <= number < 2**63 or not opened.collection.has([number])[0]:
            raise InputError(f"the collection has no reference {number}")
        return opened.table.rows([number])[0]

    def _ranked(self, opened: Opened, name: str) -> dict[str, Any]:
        """Ids of a noun's references, their agreement, and which are suspicious; its neighbours."""
        if name in opened.ranked:
            return opened.ranked[name]
        ids = compared(opened.collection.references_of(name))
        agreement, odd = agreement_with_others(read_visual(opened.collection, ids))
        near = self._noun_neighbours(opened.collection, name)
        found = {"ids": ids, "agreement": agreement, "odd": odd, "neighbours": near}
        if len(opened.ranked) > 256:
            opened.ranked.clear()
        opened.ranked[name] = found
        return found

    def _noun_neighbours(self, collection: ReferenceCollection, name: str) -> list[dict[str, Any]]:
        """Nouns with the nearest text embeddings."""
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


def compared(ids: np.ndarray) -> np.ndarray:
    """An even sample of `COMPARED` ids; all if there are no more."""
    if len(ids) <= COMPARED:
        return ids
    return ids[np.linspace(0, len(ids) - 1, COMPARED).astype(int)]


def read_visual(collection: ReferenceCollection, ids: np.ndarray) -> np.ndarray:
    """(n, d) float32 visual embeddings of references that may be scattered over the file: asked for
    together, since the system reads many pages around each row that was not prefetched."""
    prefetch_rows(collection.visual, ids)
    return np.asarray(collection.visual[ids], np.float32)


def _tables(url: str) -> list[Path]:
    """references.parquet of the collection, or those of its partitions."""
    manifest = collections.read_manifest(url)
    places = manifest.places(url) if isinstance(manifest, fmt.PartitionedManifest) else [url]
    return [collections.fetch(place)[1]["references"] for place in places]


def _row(collection: ReferenceCollection, name: str) -> int:
    """The row of a noun. Raises InputError if it is not in the vocabulary."""
    row = collection.nouns.find(name)
    if row is None:
        raise InputError(f"the vocabulary has no noun {name!r}")
    return row


def _places(url: str, build: str | None) -> tuple[BuildOutput | None, str]:
    """The build, and the place of its collection."""
    if is_collection(url):
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
