"""A collection without its deleted references: nothing of them is left in its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ovref.errors import InputError
from ovref.identity import fingerprint
from ovref.reduce.filter import write_rows
from ovref.reduce.indexing import build_indexes, tune_indexes
from ovref.reduce.int8 import in_int8
from ovref.reduce.noun_prototypes import GrownPrototypes, NoTexts, build_prototypes
from ovref.reduce.phases import in_process
from ovref.reduce.spec import ReduceSpec
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.indexed_vectors import textual_vectors
from ovref_inference.collection.prototypes import PrototypeConfig

NONE = np.zeros(0, dtype=np.int64)


def compacted_fingerprint(manifest: fmt.Manifest, paths: dict[str, Path]) -> str:
    """The fingerprint of the collection that `compact` makes."""
    deleted = fmt.read_tombstones(paths["tombstones"])
    return fingerprint([manifest.fingerprint, deleted.tolist(), "compacted"])


def compact(
    manifest: fmt.Manifest, paths: dict[str, Path], work: Path
) -> tuple[fmt.Manifest, dict[str, Path]]:
    """Rebuilds the collection from the references that are not deleted.

    They are renumbered in their order; indexes and prototypes are made of them alone, as a
    reduction makes them, and no model is needed. Nouns without a reference are left out.

    Args:
        manifest, paths: of the collection, as `collection.store.fetch` gives them.
        work: an empty local folder; it needs about three times the size of the embeddings.

    Returns:
        The same of the new collection, whose files are in `work`.

    Raises:
        InputError: all references are deleted.
    """
    deleted = fmt.read_tombstones(paths["tombstones"])
    rows = np.setdiff1d(np.arange(manifest.counts["references"]), deleted)
    if not len(rows):
        raise InputError("all references of the collection are deleted: nothing is left of it")
    source, files, nouns = (work / name for name in ("source", "files", "prototypes"))
    for folder in (source, files, nouns):
        folder.mkdir(parents=True)
    for role in ("references", "visual", "textual"):
        if role == "textual" and role not in paths:
            fmt.write_vectors(source / fmt.FILES[role], textual_vectors(paths, manifest))
        elif role != "references" and manifest.embeddings == "int8":
            fmt.write_vectors(source / fmt.FILES[role], fmt.open_vectors_anywhere(paths[role]))
        else:
            (source / fmt.FILES[role]).symlink_to(paths[role].resolve())
    for role, name in fmt.OPTIONAL_FILES.items():
        if role in paths:
            (source / name).symlink_to(paths[role].resolve())
    write_rows(source, files, rows)
    spec: dict[str, Any] = {
        "seed": ReduceSpec().seed, "index_recall": ReduceSpec().index_recall
    }  # fmt: skip
    spec |= manifest.build.get("reduce", {}).get("fields", {})
    indexes = build_indexes(
        files, files, seed=spec["seed"], grown={}, run_tasks=in_process, report=_nobody
    )
    vocabulary = build_prototypes(
        files,
        nouns,
        config=PrototypeConfig(**manifest.prototypes),
        # Its text embeddings are taken, its prototypes are not.
        grown=GrownPrototypes(
            nouns=paths["nouns"], prototypes=paths["prototypes"], references=0, excluded=NONE,
            same_settings=False,
        ),
        deleted=NONE,
        texts=NoTexts(),
        templates=manifest.templates,
        run_tasks=in_process,
        report=_nobody,
    )  # fmt: skip
    tuned = tune_indexes(
        files,
        files,
        nouns / fmt.FILES["nouns"],
        indexes,
        recall=spec["index_recall"],
        seed=spec["seed"],
        deleted=NONE,
        run_tasks=in_process,
        report=_nobody,
    )
    for role in ("nouns", "prototypes"):
        (nouns / fmt.FILES[role]).rename(files / fmt.FILES[role])
    fmt.write_table(files / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, {"id": [], "reason": []})
    summary = manifest.build.get("summary", {}) | vocabulary | {"references": len(rows)}
    made = collections.publish(
        files,
        str(files),
        replace(
            manifest,
            fingerprint=compacted_fingerprint(manifest, paths),
            embeddings="float16",
            visual_index=fmt.index_info(tuned["visual"]),
            textual_index=fmt.index_info(tuned["textual"]),
            build=manifest.build
            | {
                "summary": summary,
                "compacted": {"from": manifest.fingerprint, "deleted": len(deleted)},
            },
        ),
    )
    found = {role: files / made.files[role].path for role in made.files}
    if manifest.embeddings == "int8":
        return in_int8(made, found, work / "converted", made.fingerprint)
    return made, found


def _nobody(*_: Any) -> None:
    """A progress callback that does nothing."""
