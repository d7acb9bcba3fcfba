"""`ReferenceCollection`: open a published collection; query it by text, noun or region."""

import dataclasses
import operator
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ovref_inference.collection import format as fmt
from ovref_inference.collection import opening
from ovref_inference.collection.class_support import FLOOR, MEANINGLESS, class_support
from ovref_inference.collection.handle import CollectionHandle
from ovref_inference.collection.partitions import joined
from ovref_inference.collection.parts import Parts, opened_lists, opened_parts, prefetch_parts
from ovref_inference.collection.prototypes import (
    PrototypeConfig,
    Prototypes,
    clustered_rows,
    make_prototypes,
    retrieved_prototypes,
    stacked,
)
from ovref_inference.collection.remote import CACHE_BYTES, RemoteFile
from ovref_inference.collection.retrieve import checked_names, class_embeddings
from ovref_inference.collection.support import Support
from ovref_inference.collection.threads import THREADS, in_threads
from ovref_inference.collection.words import Words
from ovref_inference.errors import CollectionError
from ovref_inference.ranges import require_at_least
from ovref_inference.vectors import Vectors, as_float32, l2_normalised, prefetch_rows

_FILES = ("visual", "textual", "norms", "_visual_index", "_textual_index", "_prototypes", "_table")
"""Attributes that `ReferenceCollection.close` removes."""


class ReferenceCollection(CollectionHandle):
    """A published collection, memory-mapped and read-only. Thread-safe.

    with ReferenceCollection.open("s3://bucket/coco-fossil") as collection:
        support = collection.search_text(collection.embed_text(["red panda"]), k=150)
        prototypes = collection.prototypes(["red panda", "grass"], k=10)
        support = collection.search_regions(region_features, k=20)
    """

    def __init__(self, url: str, manifest: fmt.AnyManifest, parts: Parts) -> None:
        self.url = url
        self.manifest = manifest
        self.visual: Vectors = parts.visual
        """(references, d_visual) float16, memory-mapped or read by ranges, decoded from int8."""
        self.textual: Vectors = parts.textual
        """(references, d_textual) float16, likewise."""
        self.norms: Vectors | None = parts.norms
        """(references, 1) float16, norms of the visual embeddings before they were normalised; None
        unless the build kept them (`embed.norms`)."""
        self._visual_index, self._textual_index = parts.visual_index, parts.textual_index
        self._prototypes, self._deleted = parts.prototypes, parts.deleted
        self._nouns, self._table = parts.nouns, parts.table
        self.prototype_config = _prototype_config(url, manifest)

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        cache: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        copy: bool = False,
        verify: opening.Verify = "quick",
        storage_options: dict[str, Any] | None = None,
    ) -> "ReferenceCollection":
        """Opens a collection where it is, also a partitioned one. Of a remote one the ranges that
        are needed are read, through a local cache; files below 32 MiB are copied to it, but for
        tables of references, which are checked when they are first read.

        Args:
            url: folder, fsspec URL such as s3://bucket/name, or hf://user/name@revision.
            cache: folder for copies and blocks of remote files; None takes $OVREF_CACHE, or else
                the platform's cache folder.
            cache_bytes: of the blocks; beyond it the least recently used ones are deleted.
            copy: copies all of a remote collection first: one that is searched often is then as
                fast as a local one.
            verify: "quick" checks all sizes and small files' checksums, "full" all checksums; then
                a remote collection is copied.
            storage_options: for fsspec (endpoint, credentials).

        Raises:
            CollectionError: missing, truncated, foreign or of another version; the message names
                the file and what to do.
            ImportError: faiss is not installed; the message says how to get it.
        """
        options: dict[str, Any] = {"cache": cache, "storage_options": storage_options}
        in_place = not copy and verify == "quick"
        blocks = opening.block_cache(cache, cache_bytes) if in_place else None
        manifest, parts = _open_parts(str(url), {"blocks": blocks, "verify": verify, **options})
        pa.default_memory_pool().release_unused()  # what tables were read with
        collection = cls(str(url), manifest, parts)
        collection._opened = options | {"cache_bytes": cache_bytes, "copy": copy, "verify": verify}
        return collection

    def __len__(self) -> int:
        """References that are not deleted."""
        return len(self.visual) - len(self._deleted)

    def __enter__(self) -> "ReferenceCollection":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. Idempotent. Arrays already returned stay valid; later queries raise
        ValueError, also for the vectors of a `Support`."""
        if "_table" in self.__dict__:
            self._table.close()
        for name in _FILES:
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        if name in _FILES:
            raise ValueError(f"{self.url} is closed; query it before that, or open it again")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def nouns(self) -> Words:
        """The vocabulary, sorted: a sequence of str, which `list` makes a list of."""
        return self._nouns.names

    @property
    def noun_embeddings(self) -> np.ndarray:
        """(nouns, d_textual) float32, L2-normalised: `retrieve.class_embeddings` of each noun."""
        return self._nouns.embeddings

    @property
    def noun_counts(self) -> np.ndarray:
        """(nouns,) int64: references of each noun that are not deleted."""
        return self._nouns.counts

    def search_text(self, text_embeddings: Any, k: int) -> Support:
        """The k references whose textual retrieval embeddings are nearest (FOSSIL 3.3, FreeDA).

        Args:
            text_embeddings: (n, d_textual) array or tensor from the collection's text encoder, as
                returned by `embed_text`.
            k: references per query, at least 1; capped at the size of the collection.

        Raises:
            ValueError: another width, a zero or non-finite row, k < 1.
        """
        return self._search("textual", text_embeddings, k)

    def search_regions(self, region_features: Any, k: int) -> Support:
        """The k references whose visual embeddings are nearest (RetCLIP, CorrCLIPv2).

        Args:
            region_features: (n, d_visual) array or tensor, pooled by `pooling.pool_regions` from
                the collection's visual encoder, without its invalid regions.
            k: references per region, at least 1; capped at the size of the collection.

        Raises:
            ValueError: another width, a zero or non-finite row, k < 1.
        """
        return self._search("visual", region_features, k)

    def fossil_prototypes(
        self, text_embeddings: Any, *, n: int, k: int, seed: int = 0, iterations: int = 20
    ) -> Prototypes:
        """Prototypes by retrieval: the n nearest references of each class, clustered into k (FOSSIL
        3.3).

        Args:
            text_embeddings: (classes, d_textual).
            n: references retrieved per class; k: centroids per class.
            seed: seed of k-means.
            iterations: maximum number of k-means steps.

        Raises:
            ValueError: an argument out of range, or as `search_text`.
        """
        require_at_least("n", n, 1)
        support = self.search_text(text_embeddings, n)
        prefetch_rows(self.visual, support.ids[support.ids >= 0])
        sets = (self._vectors(ids[ids >= 0]) for ids in support.ids)
        return retrieved_prototypes(
            sets, self.manifest.visual.dim, k=k, seed=seed, iterations=iterations
        )

    def prototypes(
        self,
        names: Sequence[str],
        k: int | None = None,
        *,
        text_embeddings: Any = None,
        floor: float | None = FLOOR,
    ) -> Prototypes:
        """Prototypes by noun (VOCSeg 3.1), the stored ones if they are valid.

        A name in the vocabulary gets the clusters of its own references, a rare or unknown one
        those of its neighbours in text space, or none if no noun is near enough (`class_support`).

        Args:
            names: concepts; compared in lower case, without outer blanks.
            k: prototypes of each, at most `max_references` of `prototype_config`; None takes the
                collection's own number.
            text_embeddings: (names, d_textual), needed only for unknown names. None uses the
                collection's text encoder (`ovref[segment]`) and also compares with MEANINGLESS.
            floor: see `class_support`; None gives every name prototypes.

        Raises:
            ValueError: no or empty names, k out of range, embeddings of another shape.
        """
        names = checked_names(names)
        config = self.prototype_config
        if k is not None and k != config.k:
            config = dataclasses.replace(config, k=k)
        own = [self._nouns.names.find(name.strip().lower()) for name in names]
        stored = self._stored(own if config == self.prototype_config else [None] * len(own))
        fresh = [i for i, prototypes in enumerate(stored) if prototypes is None]
        embeddings = self._class_embeddings(names, own, fresh, text_embeddings, config.needed)
        made = self._fresh([own[i] for i in fresh], embeddings, config)
        recomputed = dict(zip(fresh, made, strict=True))
        found = [prototypes or recomputed[i] for i, prototypes in enumerate(stored)]
        vectors_nkd, counts = stacked([vectors for vectors, _ in found], self.manifest.visual.dim)
        sources = tuple(tuple(self.nouns[i] for i in used) for _, used in found)
        texts_cd = np.zeros((len(names), self.manifest.textual.dim), dtype=np.float32)
        texts_cd[fresh] = embeddings
        words = (lambda: self.embed_text(MEANINGLESS)) if text_embeddings is None else None
        support = class_support(self, names, texts_cd, floor=floor, meaningless=words)
        return Prototypes(vectors_nkd=vectors_nkd, counts=counts, nouns=sources).supported(support)

    def embed_text(self, names: Sequence[str]) -> np.ndarray:
        """(n, d_textual) embeddings of names, by the collection's own text encoder and templates.

        Loads the encoder at the first call, which needs torch (`pip install 'ovref[segment]'`).
        """
        return class_embeddings(self._text_encoder, names, self.manifest.templates)

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n, d_textual) embeddings of images, by the image tower of the model of `embed_text`."""
        found: np.ndarray = self._text_encoder.encode_images(images)
        return found

    def rows(self, ids: np.ndarray | list[int]) -> list[dict[str, Any]]:
        """All columns of these references, as one dict of `REFERENCE_SCHEMA` per id.

        Reads only the row groups that hold them.

        Raises:
            ValueError: an id that the collection does not have, or that is deleted.
        """
        wanted = np.asarray(ids, dtype=np.int64).ravel()
        bad = wanted[~self._table.has(wanted) | np.isin(wanted, self._deleted)]
        if len(bad):
            raise ValueError(
                f"{self.url} has no references {bad[:10].tolist()}, or they are deleted"
            )
        return self._table.rows(wanted)

    def has(self, ids: np.ndarray | list[int]) -> np.ndarray:
        """(n,) bool: whether these (n,) numbers are ids of references, deleted or not. They are
        row numbers, but for partitioned collections (`manifest.PARTITION_IDS`)."""
        return self._table.has(np.asarray(ids, dtype=np.int64))

    def ids_of(
        self, *, keys: Sequence[str] = (), sources: Sequence[str] = (), nouns: Sequence[str] = (),
        deleted: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Ids of references by origin, ascending, without deleted ones.

        Args:
            keys: keys of references, or of images (without `#`), which select all references of the
                image.
            sources: mask sources such as `daam`; nouns: as in `nouns`. A reference is selected if
                any of the three matches.
            deleted: returns deleted references instead.
        """
        ids = self._table.ids_of(keys, sources, nouns)
        return ids[np.isin(ids, self._deleted) == deleted]

    def noun_rows(self, ids: np.ndarray) -> np.ndarray:
        """Index into `nouns` of each reference, same shape as `ids`, -1 where the id is -1."""
        ids = np.asarray(ids, dtype=np.int64)
        rows = np.full(ids.shape, -1, dtype=np.int64)
        rows[ids >= 0] = self._nouns.rows_of(ids[ids >= 0])
        return rows

    def references_of(self, noun: str) -> np.ndarray:
        """Ids of a noun's references, ascending, without deleted ones; empty if it is unknown. The
        noun is compared as in `prototypes`."""
        row = self._nouns.names.find(noun.strip().lower())
        return np.zeros(0, dtype=np.int64) if row is None else self._nouns.references_of([row])[0]

    def _search(self, kind: str, queries: Any, k: int) -> Support:
        queries, k = self._checked(kind, queries), operator.index(k)
        require_at_least("k", k, 1)
        scores, ids = getattr(self, f"_{kind}_index").search(queries, k, self._deleted)
        return Support(ids=ids, scores=scores, collection=self)

    def _checked(self, kind: str, vectors: Any) -> np.ndarray:
        encoder: fmt.EncoderInfo = getattr(self.manifest, kind)
        vectors = as_float32(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != encoder.dim:
            raise ValueError(
                f"{self.url} was built with {encoder.model}: expected {kind} embeddings "
                f"(n, {encoder.dim}), found {vectors.shape}"
            )
        return l2_normalised(vectors)

    def _vectors(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.visual[ids], dtype=np.float32)

    def _class_embeddings(
        self,
        names: Sequence[str],
        own: list[int | None],
        wanted: list[int],
        given: Any,
        needed: int,
    ) -> np.ndarray:
        """(wanted, d_textual): given ones, or stored ones and, for unknown names, encoded ones;
        zeros for nouns with `needed` references, which borrow nothing."""
        if given is not None:
            given = as_float32(given)
            if len(given) != len(names):
                raise ValueError(f"{len(names)} names but {len(given)} text_embeddings")
            return self._checked("textual", given)[wanted]
        embeddings = np.zeros((len(wanted), self.manifest.textual.dim), dtype=np.float32)
        rows = {at: row for at, i in enumerate(wanted) if (row := own[i]) is not None}
        unknown = [at for at in range(len(wanted)) if at not in rows]
        counts = self.noun_counts
        rare = {at: row for at, row in rows.items() if counts[row] < needed}
        if rare:
            embeddings[list(rare)] = self._nouns.embeddings_of(list(rare.values()))
        if unknown:
            embeddings[unknown] = self.embed_text([names[wanted[at]] for at in unknown])
        return embeddings

    def _stored(self, rows: list[int | None]) -> list[tuple[np.ndarray, list[int]] | None]:
        """Stored prototypes of nouns, float16, and the nouns they were made from; None where none
        are valid."""
        found = [None if row is None else self._nouns.stored(row) for row in rows]
        spans = [np.arange(span.start, span.stop) for span, _ in filter(None, found)]
        ids = np.concatenate([np.zeros(0, np.int64), *spans])
        prefetch_rows(self._prototypes, ids)
        vectors = np.asarray(self._prototypes[ids])
        each = iter(np.split(vectors, np.cumsum([len(span) for span in spans])))
        return [stored and (next(each), stored[1]) for stored in found]

    def _fresh(
        self, rows: list[int | None], embeddings: np.ndarray, config: PrototypeConfig
    ) -> list[tuple[np.ndarray, list[int]]]:
        """Prototypes clustered now, and the nouns whose references were used, of each noun."""
        counts = self.noun_counts
        used = [
            [row]
            if row is not None and counts[row] >= config.needed
            else self._nouns.lenders(row, embedding, config)
            for row, embedding in zip(rows, embeddings, strict=True)
        ]
        nouns = sorted({i for one in used for i in one})
        ids_of = dict(zip(nouns, self._nouns.references_of(nouns), strict=True))
        sets = [np.concatenate([np.zeros(0, np.int64), *(ids_of[i] for i in one)]) for one in used]
        sets = [clustered_rows(np.sort(ids), config) for ids in sets]
        prefetch_rows(self.visual, np.concatenate([np.zeros(0, np.int64), *sets]))
        nothing = np.zeros((0, self.manifest.visual.dim), dtype=np.float32)
        return [
            (make_prototypes(self._vectors(ids), config) if one else nothing, one)
            for ids, one in zip(sets, used, strict=True)
        ]

    @cached_property
    def _text_encoder(self) -> Any:
        from ovref_inference.encoders import load_text_encoder

        return load_text_encoder(self.text_config)


def _open_parts(url: str, options: dict[str, Any]) -> tuple[fmt.AnyManifest, Parts]:
    """The manifest and the open files of the collection at `url`; `options` of `opening.opened`."""
    manifest, files = opening.opened(url, **options)
    if isinstance(manifest, fmt.Manifest):
        return manifest, opened_parts(url, manifest, files)
    # Small files are copied as a whole, of all partitions together no more than of one collection.
    in_place_bytes = opening.IN_PLACE_BYTES // len(manifest.partitions)

    def of_one(
        one: tuple[fmt.PartitionInfo, str],
    ) -> tuple[fmt.Manifest, dict[str, Path | RemoteFile]]:
        info, place = one
        found, paths = opening.opened(place, in_place_bytes=in_place_bytes, **options)
        own = fmt.checked_partition(found, info, place)
        prefetch_parts(own, paths)
        return own, paths

    places = manifest.places(url)
    found = in_threads(of_one, list(zip(manifest.partitions, places, strict=True)), THREADS)
    # In one thread: Arrow keeps memory for each thread that reads tables.
    parts = [opened_parts(place, *one) for place, one in zip(places, found, strict=True)]
    lists = opened_lists(manifest, files, parts)
    remote = [isinstance(path, RemoteFile) for _, paths in found for path in paths.values()]
    whole = joined(parts, url, lists=lists, threads=THREADS if any(remote) else 1)
    counts = manifest.counts | {"tombstones": len(whole.deleted)}
    return dataclasses.replace(manifest, counts=counts), whole


def _prototype_config(url: str, manifest: fmt.AnyManifest) -> PrototypeConfig:
    try:
        return PrototypeConfig(**manifest.prototypes)
    except (TypeError, ValueError) as error:
        raise CollectionError(f"{url}: the manifest's prototypes: {error}") from error
