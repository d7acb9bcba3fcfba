"""Reference shards to a published collection, in six phases.

    gather       all shards -> one table, two matrices          work/<fingerprint>/gather
    filter       drop references, renumber                      work/<fingerprint>/filter
    index        of visual and textual embeddings               work/<fingerprint>/index
    prototypes   vocabulary, k-means per noun                   work/<fingerprint>/prototypes
    tune         recall of the indexes, nprobe for each k       work/<fingerprint>/tune
    publish      its files, then the manifest: the collection   work/<fingerprint>/files

Indexing and clustering are lists of tasks (`phases`), which any process that can see the work
folder may run; matrices are read in parts, so memory does not grow with the number of references. A
killed reduction resumes with the phase that was interrupted. Two reductions of the same references
give the same bytes, regardless of how and in which order the shards were made.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ovref.errors import MismatchError
from ovref.identity import fingerprint, spec_identity
from ovref.reduce.filter import DROPPED, filter_references
from ovref.reduce.gather import gather
from ovref.reduce.grow import Base, grown_indexes, grown_prototypes, inputs_of, open_base
from ovref.reduce.indexing import build_indexes, tune_indexes
from ovref.reduce.inputs import References, dropped_before, new_shards
from ovref.reduce.int8 import write_in_int8
from ovref.reduce.made_from import MadeFrom
from ovref.reduce.noun_prototypes import build_prototypes
from ovref.reduce.phases import (
    SUMMARY,
    Report,
    RunTasks,
    in_process,
    one_at_a_time,
    run_phase,
)
from ovref.reduce.published import Published, already_published, read_published
from ovref.reduce.spec import FilterSpec, ReduceSpec
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.retrieve import Texts


def reduce_undivided(
    references: Sequence[StepFolder | References],
    spec: ReduceSpec,
    *,
    made_from: MadeFrom,
    texts: Texts,
    output: Store,
    work: Path,
    base: Store | None,
    replace: bool = False,
    allow_incomplete: bool = False,
    embeddings: Mapping[str, np.ndarray] | None = None,
    cache: Path | None = None,
    run_tasks: RunTasks = in_process,
    report: Report = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Makes a collection, or one partition of one; see `collection.reduce_collection`.

    Args:
        references: steps, whose new shards are taken, or what is new already.
        embeddings: of nouns that `texts` need not encode, (d_textual,) float32 each.
        cache: folder for a copy of a remote `base`; None takes the user's.
    """
    before = read_published(output, replace=replace)
    grown = open_base(base, made_from, cache) if base else None
    base_manifest = grown.manifest if grown else None
    inputs = [
        new_shards(one, made_from, inputs_of(grown), allow_incomplete)
        if isinstance(one, StepFolder)
        else one
        for one in references
    ]
    filters = FilterSpec() if any(one.passed_filters for one in inputs) else spec.filter
    identity = _identity(spec, made_from, inputs, grown)
    wanted = fingerprint(identity)

    standing = partial(
        already_published, output, wanted, base_manifest, spec,
        nothing_new=not identity["inputs"], replace=replace,
    )  # fmt: skip
    if (made := standing()) is not None:
        return _summary_of(made, wanted)
    folder = work / wanted[:16]
    with one_at_a_time(folder.with_name(f"{folder.name}.lock"), report):
        if (made := standing()) is not None:  # made while this process waited
            return _summary_of(made, wanted)
        existing = grown.rows if grown else 0
        deleted = fmt.read_tombstones(grown.paths["tombstones"]) if grown else np.zeros(0, np.int64)
        gathered = run_phase(folder, "gather", lambda out: gather(grown, inputs, out, report))
        filtered = run_phase(
            folder,
            "filter",
            lambda out: filter_references(
                folder / "gather",
                out,
                filters,
                existing=existing,
                deleted=deleted,
                seed=spec.seed,
                report=report,
            ),
        )
        for path in (folder / "gather").iterdir():  # `filter` has all that is needed of it
            if path.name != SUMMARY:
                path.unlink()
        built = run_phase(
            folder,
            "index",
            lambda out: build_indexes(
                folder / "filter",
                out,
                seed=spec.seed,
                grown=grown_indexes(grown, spec),
                run_tasks=run_tasks,
                report=report,
            ),
        )
        vocabulary = run_phase(
            folder,
            "prototypes",
            lambda out: build_prototypes(
                folder / "filter",
                out,
                config=spec.prototypes,
                grown=grown_prototypes(grown, spec),
                deleted=deleted,
                texts=texts,
                templates=made_from.templates,
                known=embeddings or {},
                run_tasks=run_tasks,
                report=report,
            ),
        )
        indexes = run_phase(
            folder,
            "tune",
            lambda out: tune_indexes(
                folder / "filter",
                folder / "index",
                folder / "prototypes" / fmt.FILES["nouns"],
                built,
                recall=spec.index_recall,
                seed=spec.seed,
                deleted=deleted,
                run_tasks=run_tasks,
                report=report,
            ),
        )
        assembled = run_phase(
            folder, "files", lambda out: _assemble(folder, out, grown, spec, indexes, deleted)
        )
        indexes = assembled or indexes  # the phase was finished by an older version: float16

        summary: dict[str, Any] = {
            "references": filtered["references"],
            "added": filtered["references"] - existing,
            "dropped_before": dropped_before(inputs),
            "filter": filtered["steps"],
            "noun_agreement": filtered["noun_agreement"],
            **{name: filtered[name] for name in ("flagged", "lost_nouns") if name in filtered},
            "index": indexes,
            **vocabulary,
        }
        dims = gathered["dim_visual"], gathered["dim_textual"]
        manifest = fmt.Manifest(
            fingerprint=wanted,
            **made_from.heading(spec, identity["licences"], *dims),
            visual_index=fmt.index_info(indexes["visual"]),
            textual_index=fmt.index_info(indexes["textual"]),
            build={
                "reduce": spec_identity(spec),
                "embed": made_from.embed,
                "inputs": inputs_of(grown) + identity["inputs"],
                "base": identity["base"],
                "provenance": made_from.provenance_with(base_manifest),
                "summary": summary,
            },
        )
        if (made := standing()) is not None:  # on another machine
            _clean(folder)
            return _summary_of(made, wanted)
        if read_published(output, replace=replace) != before:
            raise changed_meanwhile(output.url)
        complete = collections.publish(
            folder / "files", output.url, manifest, storage_options=output.storage_options
        )
        report("publish", 1, 1)
        _clean(folder)
        return summary | {"fingerprint": complete.fingerprint}


def changed_meanwhile(url: str) -> MismatchError:
    """The error for a collection that someone else has changed."""
    return MismatchError(
        f"{url} was changed while this collection was made: it was grown, or references of it "
        "were deleted; run the same command again"
    )


def _summary_of(made: Published, wanted: str) -> dict[str, Any]:
    """The summary of a published collection that is the requested one, or its base, unchanged."""
    return made.summary() if made.manifest.fingerprint == wanted else made.summary(added=0)


def _identity(
    spec: ReduceSpec, made_from: MadeFrom, inputs: Sequence[References], grown: Base | None
) -> dict[str, Any]:
    """Everything that affects the collection's bytes."""
    base = grown.manifest if grown else None
    return {
        "format_version": fmt.FORMAT_VERSION,
        "reduce": spec_identity(spec),
        "embed": made_from.embed,
        "inputs": [found for one in inputs if (found := one.identity)],
        "base": base.fingerprint if base else None,
        "tombstones": base.files["tombstones"].sha256 if base else None,
        "licences": made_from.licences_with(base),
    }


def _assemble(
    folder: Path, out: Path, grown: Base | None, spec: ReduceSpec, indexes: dict[str, Any],
    deleted: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """Collects all files of the collection in one folder, as links if on the same disk; returns
    `indexes`, measured again if embeddings are int8."""
    made_by = {
        "references": "filter",
        "visual": "filter",
        "textual": "filter",
        "visual_index": "index",
        "textual_index": "index",
        "nouns": "prototypes",
        "prototypes": "prototypes",
    }
    for role, phase in made_by.items():
        if role == "textual" and spec.textual_embeddings != "stored":
            continue
        if spec.embeddings == "float16" or role not in ("visual", "textual"):
            os.link(folder / phase / fmt.FILES[role], out / fmt.FILES[role])
    for name in fmt.OPTIONAL_FILES.values():
        if (folder / "filter" / name).exists():
            os.link(folder / "filter" / name, out / name)
    tombstones = out / fmt.FILES["tombstones"]
    if grown:
        shutil.copyfile(grown.paths["tombstones"], tombstones)
    else:
        fmt.write_table(tombstones, fmt.TOMBSTONE_SCHEMA, {"id": [], "reason": []})
    if spec.embeddings == "int8":
        return write_in_int8(
            folder / "filter", out, indexes, seed=spec.seed, deleted=deleted,
            textual=spec.textual_embeddings == "stored",
        )  # fmt: skip
    return indexes


def _clean(folder: Path) -> None:
    """Removes the phases of a published collection, but for the list of dropped references."""
    shutil.copyfile(folder / "filter" / DROPPED, folder.with_name(f"{folder.name}-{DROPPED}"))
    # Renamed first, because a half-deleted folder must not pass for a complete phase.
    done = folder.with_name(f"{folder.name}.done")
    shutil.rmtree(done, ignore_errors=True)
    os.replace(folder, done)
    shutil.rmtree(done)
