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
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ovref import config
from ovref.errors import InputError, MismatchError
from ovref.identity import canonical, fingerprint, spec_identity
from ovref.locations import with_absolute_models
from ovref.reduce.filter import DROPPED, filter_references
from ovref.reduce.gather import Shards, gather
from ovref.reduce.grow import (
    Base,
    grown_indexes,
    grown_prototypes,
    inputs_of,
    open_base,
    provenance_of,
)
from ovref.reduce.indexing import build_indexes, tune_indexes
from ovref.reduce.int8 import write_in_int8
from ovref.reduce.noun_prototypes import build_prototypes
from ovref.reduce.phases import Report, RunTasks, in_process, one_at_a_time, run_phase
from ovref.reduce.spec import ReduceSpec
from ovref.stages.embed import Embed
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.retrieve import Texts
from ovref_inference.errors import CollectionError


def reduce_collection(
    references: StepFolder | Sequence[StepFolder],
    spec: ReduceSpec,
    *,
    embed: Embed,
    texts: Texts,
    output: Store,
    work: str | Path,
    licences: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    base: Store | None = None,
    replace: bool = False,
    allow_incomplete: bool = False,
    run_tasks: RunTasks = in_process,
    report: Report = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Makes the collection of these reference shards and publishes it at `output`.

    Args:
        references: the step, or several steps, in the order in which their references are stored.
        embed: the stage that made the references; its encoders, templates and weights go into the
            manifest.
        texts: `embed.text`, loaded; encodes the vocabulary.
        output: where the collection is published; `base` itself to grow it in place.
        work: local folder for the phases; it needs about five times the size of the embeddings.
            The list of dropped references stays there (`<fingerprint>-dropped.parquet`), the rest
            is removed at the end.
        licences: stated for the inputs; part of the collection's fingerprint.
        provenance: what the references were made from, as plain values, for the manifest: corpus,
            steps, models and, under `licences`, what follows from them.
        base: a published collection to grow. Its references keep their ids and are not filtered
            again, its shards are not read again, and its tombstones stay. New references are added
            to the indexes, and nouns with a new or deleted reference get new prototypes. Without
            new shards, this applies tombstones or changes the prototypes.
        replace: whether another collection at `output` may be overwritten.
        allow_incomplete: whether steps may lack shards.
        run_tasks: runs the tasks of indexing and clustering, in this process or in others that can
            see `work`; the bytes do not depend on it.
        report: called with the progress.

    Returns:
        Plain values: `fingerprint`; the counts `references`, `nouns`, `rare_nouns` and
        `prototypes`; `added`, the number of references that `base` did not have; `dropped_before`,
        the embed step's drops by reason; `filter`, counts before and after each filter; `flagged`
        (where images were classified), the number of kept references of unsafe ones; `lost_nouns`
        (where there are some), those that the filters left no reference of; `noun_agreement`;
        `index`; `most_frequent` and `least_frequent`, [noun, references].

    Raises:
        InputError: there are no references, a step is incomplete, embedding widths differ, or the
            filters leave nothing.
        MismatchError: `output` holds another collection, or one with tombstones that is not
            `base`, or was changed meanwhile; or a step or `base` was made with encoders, templates
            or weights that differ from those of `embed`.
        CollectionError: `base`, or the collection at `output`, cannot be read.
        ValueError: a vector or a noun that cannot be encoded.
    """
    made_from = dict(provenance or {})
    steps = [references] if isinstance(references, StepFolder) else list(references)
    before = _published(output, replace)
    grown = open_base(base, embed) if base else None
    inputs = [_shards(step, embed, grown, allow_incomplete) for step in steps]
    identity = _identity(spec, embed, inputs, grown, licences)
    wanted = fingerprint(identity)

    standing = partial(_already_published, output, wanted, grown, spec, inputs, replace)
    if (summary := standing()) is not None:
        return summary
    folder = Path(work) / wanted[:16]
    with one_at_a_time(folder.with_name(f"{folder.name}.lock"), report):
        if (summary := standing()) is not None:  # made while this process waited
            return summary
        existing = grown.rows if grown else 0
        deleted = fmt.read_tombstones(grown.paths["tombstones"]) if grown else np.zeros(0, np.int64)
        gathered = run_phase(folder, "gather", lambda out: gather(grown, inputs, out, report))
        filtered = run_phase(
            folder,
            "filter",
            lambda out: filter_references(
                folder / "gather",
                out,
                spec.filter,
                existing=existing,
                deleted=deleted,
                seed=spec.seed,
                report=report,
            ),
        )
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
                templates=embed.templates,
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

        summary = {
            "references": filtered["references"],
            "added": filtered["references"] - existing,
            "dropped_before": _dropped_before(inputs),
            "filter": filtered["steps"],
            "noun_agreement": filtered["noun_agreement"],
            **{name: filtered[name] for name in ("flagged", "lost_nouns") if name in filtered},
            "index": indexes,
            **vocabulary,
        }
        placed = with_absolute_models(embed)  # whoever opens the collection is elsewhere
        manifest = fmt.Manifest(
            fingerprint=wanted,
            visual=_encoder_info(placed.visual, gathered["dim_visual"]),
            textual=_encoder_info(placed.text, gathered["dim_textual"]),
            templates=tuple(embed.templates),
            weights=(embed.weights[0], embed.weights[1]),
            visual_index=fmt.index_info(indexes["visual"]),
            textual_index=fmt.index_info(indexes["textual"]),
            prototypes=config.dump(spec.prototypes),
            embeddings=spec.embeddings,
            licences=tuple(dict.fromkeys([*identity["licences"], *made_from.get("licences", ())])),
            build={
                "reduce": spec_identity(spec),
                "embed": spec_identity(embed),
                "inputs": inputs_of(grown) + identity["inputs"],
                "base": identity["base"],
                "provenance": provenance_of(grown, made_from),
                "summary": summary,
            },
        )
        if (made := standing()) is not None:  # on another machine
            _clean(folder)
            return made
        if _published(output, replace) != before:
            raise MismatchError(
                f"{output.url} was changed while this collection was made: it was grown, or "
                "references of it were deleted; run the same command again"
            )
        complete = collections.publish(
            folder / "files", output.url, manifest, storage_options=output.storage_options
        )
        report("publish", 1, 1)
        _clean(folder)
        return summary | {"fingerprint": complete.fingerprint}


def _already_published(
    output: Store, wanted: str, grown: Base | None, spec: ReduceSpec, inputs: list[Shards],
    replace: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """The summary of the published collection if it is the requested one; None otherwise.

    Raises:
        MismatchError: it is another collection and must not be replaced, or replacing it would
            bring deleted references back.
    """
    published = _published(output, replace)
    if published is None:
        return None
    if published.fingerprint == wanted:
        return published.build["summary"] | {"fingerprint": published.fingerprint}
    of_base = grown is not None and published.fingerprint == grown.manifest.fingerprint
    if of_base and _up_to_date(published, spec, inputs):
        return published.build["summary"] | {"fingerprint": published.fingerprint, "added": 0}
    if not of_base and not replace:
        raise MismatchError(
            f"{output.url} holds another collection (fingerprint {published.fingerprint[:12]}, "
            f"this one has {wanted[:12]}); choose another folder, or set replace=true"
        )
    deleted = published.counts.get("tombstones", 0)
    if not of_base and deleted:
        raise MismatchError(
            f"{output.url} has {deleted} deleted references, which a new collection would contain "
            f"again: choose another folder, or keep them deleted with base={output.url}"
        )
    return None


def _shards(step: StepFolder, embed: Embed, grown: Base | None, allow_incomplete: bool) -> Shards:
    """The shards of a step that the collection does not have yet."""
    commits = step.commits()
    _check_made_by(embed, step)
    if step.complete() is None and not allow_incomplete:
        raise InputError(
            f"{step.store.url} is not complete: {len(commits)} shards are committed, more may "
            "follow; finish the build, or set allow_incomplete=true to use the committed ones"
        )
    known = {
        shard
        for earlier in inputs_of(grown)
        if earlier["fingerprint"] == step.fingerprint
        for shard in earlier["shards"]
    }
    return Shards(step, {shard: commits[shard] for shard in sorted(commits.keys() - known)})


def _check_made_by(embed: Embed, step: StepFolder) -> None:
    """Raises MismatchError unless `embed` made the step.

    Embeddings of different encoders cannot be compared, and the width need not reveal it.
    """
    stages = [stage for stage in step.identity.get("stages", []) if stage["name"] == embed.name]
    if not stages:
        raise MismatchError(
            f"{step.store.url} was not made by the stage {embed.name}, so it holds no references"
        )
    # Steps do not record what was added later, at its default.
    fields = {"part": "region", "norms": False} | stages[-1]["fields"]
    for name in ("visual", "text", "templates", "weights", "part", "norms"):
        wanted, found = canonical(getattr(embed, name)), fields[name]
        if wanted != found:
            raise MismatchError(
                f"{step.store.url} was made with other settings: {name} was {found} and is now "
                f"{wanted}; restore the setting, or embed the images again into another folder"
            )


def _up_to_date(base: fmt.Manifest, spec: ReduceSpec, inputs: list[Shards]) -> bool:
    """Whether growing `base` would change nothing."""
    return (
        not any(shards.commits for shards in inputs)
        and base.settled_tombstones == base.counts["tombstones"]
        and base.build["reduce"] == spec_identity(spec)
    )


def _identity(
    spec: ReduceSpec,
    embed: Embed,
    inputs: list[Shards],
    grown: Base | None,
    licences: Sequence[str],
) -> dict[str, Any]:
    """Everything that affects the collection's bytes."""
    contents = [
        {
            "step": shards.step.name,
            "fingerprint": shards.step.fingerprint,
            "shards": list(shards.commits),
            "content": fingerprint(
                {
                    shard: {extension: file.sha256 for extension, file in commit.files.items()}
                    for shard, commit in shards.commits.items()
                }
            ),
        }
        for shards in inputs
        if shards.commits
    ]
    earlier = grown.manifest.licences if grown else ()
    return {
        "format_version": fmt.FORMAT_VERSION,
        "reduce": spec_identity(spec),
        "embed": spec_identity(embed),
        "inputs": contents,
        "base": grown.manifest.fingerprint if grown else None,
        "tombstones": grown.manifest.files["tombstones"].sha256 if grown else None,
        "licences": list(dict.fromkeys([*earlier, *licences])),
    }


def _published(output: Store, replace: bool) -> fmt.Manifest | None:
    """The manifest of the collection at `output`; None if there is none that must be kept."""
    if not output.exists(fmt.MANIFEST):
        return None
    try:
        return collections.read_manifest(output.url, storage_options=output.storage_options)
    except CollectionError:
        if replace:
            return None
        raise


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
        return write_in_int8(folder / "filter", out, indexes, seed=spec.seed, deleted=deleted)
    return indexes


def _encoder_info(encoder: Any, dim: int) -> fmt.EncoderInfo:
    return fmt.EncoderInfo(
        model=encoder.model, revision=encoder.revision, dim=dim, settings=canonical(encoder)
    )


def _dropped_before(inputs: list[Shards]) -> dict[str, int]:
    """The embed step's drops in these shards, of records and regions, by reason."""
    counts: Counter[str] = Counter()
    for shards in inputs:
        for commit in shards.commits.values():
            counts.update(commit.dropped)
            counts.update(commit.dropped_parts)
    return dict(sorted(counts.items()))


def _clean(folder: Path) -> None:
    """Removes the phases of a published collection, but for the list of dropped references."""
    shutil.copyfile(folder / "filter" / DROPPED, folder.with_name(f"{folder.name}-{DROPPED}"))
    # Renamed first, because a half-deleted folder must not pass for a complete phase.
    done = folder.with_name(f"{folder.name}.done")
    shutil.rmtree(done, ignore_errors=True)
    os.replace(folder, done)
    shutil.rmtree(done)
