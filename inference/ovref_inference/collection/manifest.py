"""collection.json, the manifest of a reference collection: its fields, and how it is read.

A *partitioned* collection (version 4) is a folder of ordinary ones, which open alone too:

    collection.json             its manifest (`PartitionedManifest`); written last
    partitions/00000/...        collections of version 2, 3 or 5; no noun is in two of them
    partition_tree...           how nouns were divided, for growing
    visual_lists.faiss          index over the inverted lists of all partitions' visual indexes, and
    textual_lists.faiss         of their textual ones, if they have many (version 6)

A reference's id is `number of the partition * PARTITION_IDS + id within it`. Deletions belong to
the partitions, whose manifests they change; the partitioned manifest stays as it was made.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.errors import CollectionError

FORMAT_VERSION = 2
INT8_VERSION = 3
PARTITIONED_VERSION = 4
IN_INDEX_VERSION = 5
LISTS_VERSION = 6
READABLE_VERSIONS = (1, 2, 3, 4, 5, 6)
"""Version 1 has one search setting per index, tuned for one k; version 2 has a curve; version 3 is
version 2 with embeddings in int8; version 4 is a folder of collections of other versions; version
5 is version 2 or 3 with textual embeddings in the textual index alone; version 6 is version 4 with
indexes over the inverted lists of all partitions."""
PARTITION_IDS = 2**32
"""Ids of a partition; a partition's first id is its number times this."""
MANIFEST = "collection.json"
FILES = {
    "references": "references.parquet",
    "visual": "visual.f16.npy",
    "textual": "textual.f16.npy",
    "visual_index": "visual.faiss",
    "textual_index": "textual.faiss",
    "nouns": "nouns.parquet",
    "prototypes": "prototypes.f16.npy",
    "tombstones": "tombstones.parquet",
}
"""Role -> file name in a folder to publish."""
INT8_FILES = FILES | {"visual": "visual.int8.npy", "textual": "textual.int8.npy"}
EMBEDDINGS = {"float16": FILES, "int8": INT8_FILES}
"""How embeddings are stored -> file names."""
LISTS = ("visual_lists", "textual_lists")
"""Files of a partitioned collection, and fields of its manifest; both or none."""
TEXTUAL_EMBEDDINGS = ("stored", "in_index")
OPTIONAL_FILES = {"norms": "norms.f16.npy"}  # a collection may lack them


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """The model behind one kind of embedding."""

    model: str
    """Hub id, path or `miniature:<name>`, as configured."""
    revision: str
    """Commit or tag; empty if the model has none."""
    dim: int
    settings: dict[str, Any] = field(default_factory=dict)
    """All fields of the encoder's config, enough to load it again."""


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """The search setting for one number of neighbours, and the recall measured with it."""

    k: int
    """Number of neighbours."""
    nprobe: int
    """Inverted lists searched."""
    recall: float
    """Mean recall@k over the queries against exact search, in [0, 1]."""
    worst_tenth: float | None
    """Mean recall@k over the 10% of the queries with the lowest recall; None in version 1."""


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """How an index was built and how to search it."""

    factory: str
    """faiss factory string, by inner product."""
    curve: tuple[SearchPoint, ...] = ()
    """Ascending in k; empty when the search is exact."""
    queries: str = ""
    """What recall was measured with: `class names` (the collection's nouns in its templates) or
    `held-out rows` (stored rows, each without itself); empty when the search is exact."""
    train_rows: int = 0
    """References that the lists' centroids were trained on; 0 for an index without lists."""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One file of the collection, relative to collection.json."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What the manifest of any collection says."""

    fingerprint: str
    """Hash of everything that affected the collection's bytes."""
    visual: EncoderInfo
    textual: EncoderInfo
    templates: tuple[str, ...]
    weights: tuple[float, float]
    """Weights of noun and caption in the textual retrieval embeddings."""
    prototypes: dict[str, Any]
    """Fields of `prototypes.PrototypeConfig`."""
    licences: tuple[str, ...] = ()
    """Licences of the inputs: corpora, images, model weights."""
    build: dict[str, Any] = field(default_factory=dict)
    """Plain values: effective configuration, versions, parents' fingerprints; `provenance`, a list
    with the corpus, the steps' settings, the models (id, revision, weights, licence) of each build
    that contributed. Collections of earlier versions have no `provenance`."""
    counts: dict[str, int] = field(default_factory=dict)
    """references, nouns, prototypes, tombstones."""
    files: dict[str, FileInfo] = field(default_factory=dict)
    """Role (a key of FILES) -> file."""
    embeddings: str = "float16"
    """How visual and textual embeddings are stored, a key of EMBEDDINGS; not written if float16."""
    textual_embeddings: str = "stored"
    """One of TEXTUAL_EMBEDDINGS. `in_index`: the textual index has them, and there is no file of
    them; not written if `stored`."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Heading):
    """collection.json. `publish` fills in `counts`, `files` and `settled_tombstones`."""

    visual_index: IndexInfo
    textual_index: IndexInfo
    settled_tombstones: int = 0
    """The first this many tombstones are older than the prototypes, which exclude them."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class PartitionInfo:
    """One partition: a collection that opens alone too."""

    path: str
    """Its folder, relative to collection.json: partitions/<name>."""
    fingerprint: str
    """In its own manifest; deletions do not change it."""
    references: int
    nouns: int


@dataclass(frozen=True, kw_only=True)
class PartitionedManifest(Heading):
    """collection.json of a partitioned collection: `counts` are sums over the partitions when it
    was made, `files` may name a `partition_tree`."""

    partitions: tuple[PartitionInfo, ...]
    """In the order of their numbers, which are part of their references' ids."""
    visual_lists: IndexInfo | None = None
    """The index over the centroids of the inverted lists of all visual indexes, partition after
    partition; None if they are few, and then not written. Its k is a number of lists."""
    textual_lists: IndexInfo | None = None
    """Likewise of the textual indexes."""
    format_version: int = PARTITIONED_VERSION

    def places(self, url: str) -> list[str]:
        """The URLs of the partitions of the collection at `url`."""
        return [f"{url.rstrip('/')}/{one.path}" for one in self.partitions]


AnyManifest = Manifest | PartitionedManifest


def version_of(manifest: Heading) -> int:
    """The format version that a manifest is written with."""
    if isinstance(manifest, PartitionedManifest):
        return LISTS_VERSION if manifest.visual_lists else PARTITIONED_VERSION
    if manifest.textual_embeddings != "stored":
        return IN_INDEX_VERSION
    return FORMAT_VERSION if manifest.embeddings == "float16" else INT8_VERSION


def file_names(manifest: Heading) -> dict[str, str]:
    """Role -> file name in a folder to publish, of all files that a collection must have."""
    names = EMBEDDINGS[manifest.embeddings]
    stored = manifest.textual_embeddings == "stored"
    return {role: name for role, name in names.items() if stored or role != "textual"}


def manifest_bytes(manifest: Heading) -> bytes:
    """The content of collection.json: sorted keys, plain JSON, one final newline."""
    tree = dataclasses.asdict(manifest)
    for name, usual in (("embeddings", "float16"), ("textual_embeddings", "stored")):
        if tree[name] == usual:
            del tree[name]
    for name in LISTS:
        if name in tree and tree[name] is None:
            del tree[name]
    text = json.dumps(tree, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def parse_manifest(content: bytes, where: str) -> AnyManifest:
    """Reads collection.json.

    Raises:
        CollectionError: truncated, not a collection's manifest, of another format version, or with
            fields that contradict each other.
    """
    tree = _manifest_tree(content, where)
    version = tree["format_version"]
    try:
        fields = {
            **tree,
            "visual": EncoderInfo(**tree["visual"]),
            "textual": EncoderInfo(**tree["textual"]),
            **{name: tuple(tree[name]) for name in ("templates", "weights", "licences")},
            "files": {role: FileInfo(**info) for role, info in tree["files"].items()},
        }
        manifest: AnyManifest
        if version in (PARTITIONED_VERSION, LISTS_VERSION):
            partitions = tuple(PartitionInfo(**one) for one in tree["partitions"])
            lists = {name: index_info(tree[name]) for name in LISTS if name in tree}
            manifest = PartitionedManifest(**{**fields, "partitions": partitions, **lists})
        else:
            indexes = {name: index_info(tree[name]) for name in ("visual_index", "textual_index")}
            manifest = Manifest(**{**fields, **indexes})
    except (TypeError, KeyError, AttributeError) as error:
        raise CollectionError(
            f"{where} is not a manifest of format version {version}: {error}"
        ) from error
    for info in manifest.files.values():
        if Path(info.path).name != info.path or info.path in ("", ".", ".."):
            raise CollectionError(f"{where} names a file outside its folder: {info.path!r}")
    if isinstance(manifest, PartitionedManifest):
        _check_partitions(manifest, where)
        return manifest
    known = manifest.embeddings in EMBEDDINGS and manifest.textual_embeddings in TEXTUAL_EMBEDDINGS
    if not known or version_of(manifest) != max(version, FORMAT_VERSION):
        raise CollectionError(
            f"{where} of version {version} stores embeddings as {manifest.embeddings!r}, textual "
            f"ones {manifest.textual_embeddings!r}; version {INT8_VERSION} has int8, version "
            f"{IN_INDEX_VERSION} textual ones in the index alone: use the ovref that wrote it"
        )
    if missing := sorted(file_names(manifest).keys() - manifest.files.keys()):
        raise CollectionError(f"{where} names no file for {', '.join(missing)}")
    return manifest


def undivided(manifest: AnyManifest, url: str) -> Manifest:
    """The manifest of the collection at `url`. Raises CollectionError if it is partitioned."""
    if isinstance(manifest, PartitionedManifest):
        raise CollectionError(
            f"{url} is partitioned, which this cannot take as a whole: give one of its partitions, "
            f"such as {manifest.places(url)[0]}"
        )
    return manifest


def checked_partition(own: AnyManifest, info: PartitionInfo, where: str) -> Manifest:
    """The manifest of the partition at `where`, if it is the one that the whole collection's
    names.

    Raises:
        CollectionError: it is another one.
    """
    found = undivided(own, where)
    counts = found.counts["references"], found.counts["nouns"]
    if (found.fingerprint, *counts) != (info.fingerprint, info.references, info.nouns):
        raise CollectionError(
            f"{where} is not the partition that the collection's manifest names (fingerprint "
            f"{found.fingerprint[:12]}, named is {info.fingerprint[:12]}): it was replaced, or the "
            "collection is being published just now; open it again, or publish it again"
        )
    return found


def _check_partitions(manifest: PartitionedManifest, where: str) -> None:
    paths = [one.path for one in manifest.partitions]
    for path in paths:
        if not re.fullmatch(r"partitions/\w[\w.-]*", path):
            raise CollectionError(f"{where} names a partition outside its folder: {path!r}")
    named = [name for name in LISTS if getattr(manifest, name) and name in manifest.files]
    if tuple(named) != (LISTS if manifest.format_version == LISTS_VERSION else ()):
        raise CollectionError(
            f"{where} of version {manifest.format_version} names {named}; version {LISTS_VERSION} "
            f"has {' and '.join(LISTS)}, both as fields and files: publish the collection again"
        )
    if not paths or len(set(paths)) != len(paths):
        raise CollectionError(f"{where} names no partition, or one of them twice")
    for name in ("references", "nouns"):
        total = sum(getattr(one, name) for one in manifest.partitions)
        if total != manifest.counts.get(name):
            raise CollectionError(
                f"{where} counts {manifest.counts.get(name)} {name}, its partitions hold {total}"
            )


def _manifest_tree(content: bytes, where: str) -> dict[str, Any]:
    """The JSON of any collection.json, its version checked. Raises CollectionError."""
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise CollectionError(
            f"{where} is truncated or not JSON ({error}); publish the collection again"
        ) from error
    if not isinstance(tree, dict) or "format_version" not in tree:
        raise CollectionError(f"{where} is not the manifest of a reference collection")
    if tree["format_version"] not in READABLE_VERSIONS:
        raise CollectionError(
            f"{where} has format version {tree['format_version']!r}, this program reads "
            f"{', '.join(map(str, READABLE_VERSIONS))}; use the ovref that wrote it or build again"
        )
    return tree


def index_info(tree: Mapping[str, Any]) -> IndexInfo:
    """An IndexInfo from its JSON; in version 1 the curve has one point."""
    fields = dict(tree)
    if "search" in fields:
        k, recall, search = (fields.pop(name) for name in ("recall_k", "recall", "search"))
        curve = [{"k": k, "recall": recall, "worst_tenth": None, **search}] if search else []
        fields |= {"curve": curve, "queries": "held-out rows" if search else ""}
    return IndexInfo(**{**fields, "curve": tuple(SearchPoint(**at) for at in fields["curve"])})


def by_partition(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The partitions of (n,) ids: the number of each, where its ids are among them, and their rows
    in it."""
    numbers = np.asarray(ids, dtype=np.int64) // PARTITION_IDS
    for number in np.unique(numbers).tolist():
        where = np.flatnonzero(numbers == number)
        yield number, where, ids[where] - number * PARTITION_IDS
