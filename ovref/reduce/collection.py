"""A collection from reference shards: undivided, or in partitions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovref.reduce.grow import check_same_encoders
from ovref.reduce.made_from import MadeFrom, made_by
from ovref.reduce.partitioned import reduce_partitioned
from ovref.reduce.phases import Report, RunTasks, in_process
from ovref.reduce.published import Published, check_kind_of_base, read_published
from ovref.reduce.run import reduce_undivided
from ovref.reduce.spec import ReduceSpec
from ovref.stages.embed import Embed
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder
from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_inference.collection import store as collections
from ovref_inference.collection.retrieve import Texts


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
        texts: `embed.text`, loaded; encodes the vocabulary. Of a partitioned collection it is sent
            to workers, so it should load its model at its first use.
        output: where the collection is published; `base` itself to grow it in place.
        work: local folder for the phases; it needs about five times the size of the embeddings, or
            of one partition's, on each machine. The list of dropped references stays there
            (`<fingerprint>-dropped.parquet`), the rest is removed at the end.
        licences: stated for the inputs; part of the collection's fingerprint.
        provenance: what the references were made from, as plain values, for the manifest: corpus,
            steps, models and, under `licences`, what follows from them.
        base: a published collection to grow. Its references keep their ids and are not filtered
            again, its shards are not read again, and its tombstones stay. New references are added
            to the indexes, and nouns with a new or deleted reference get new prototypes. Without
            new shards, this applies tombstones or changes the prototypes.
        replace: whether another collection at `output` may be overwritten.
        allow_incomplete: whether steps may lack shards.
        run_tasks: runs the tasks, in this process or in others; the bytes do not depend on it. They
            must see `work`, or, of a partitioned collection, `output` and the steps.
        report: called with the progress.

    Returns:
        Plain values: `fingerprint`; the counts `references`, `nouns`, `rare_nouns` and
        `prototypes`; `added`, the number of references that `base` did not have; `dropped_before`,
        the embed step's drops by reason; `filter`, counts before and after each filter;
        `lost_nouns` (where there are some), those whose references they all dropped; `flagged`
        (where images were classified), the number of kept references of unsafe ones;
        `noun_agreement`; `most_frequent` and `least_frequent`, [noun, references]; `index`, or, of
        a partitioned collection, `partitions`, `partitions_made` by this reduction, and
        `largest_partition`, references.

    Raises:
        InputError: there are no references, a step is incomplete, embedding widths differ, or the
            filters leave nothing.
        MismatchError: `output` holds another collection, or one with tombstones that is not
            `base`, or was changed meanwhile; or a step or `base` was made with encoders, templates
            or weights that differ from those of `embed`; or `base` is partitioned and the new
            collection would not be, or the reverse.
        CollectionError: `base`, or the collection at `output`, cannot be read.
        ValueError: a vector or a noun that cannot be encoded.
    """
    made_from = made_by(embed, licences, provenance)
    if base is not None:
        check_base(base, spec, made_from)
    steps = [references] if isinstance(references, StepFolder) else list(references)
    arguments: dict[str, Any] = {
        "made_from": made_from, "texts": texts, "output": output,
        "work": Path(work), "base": base, "replace": replace,
        "allow_incomplete": allow_incomplete, "run_tasks": run_tasks, "report": report,
    }  # fmt: skip
    if spec.partition_references is None:
        return reduce_undivided(steps, spec, **arguments)
    return reduce_partitioned(steps, spec, **arguments)


def check_base(base: Store, spec: ReduceSpec, made_from: MadeFrom) -> None:
    """Reads the manifest of a collection that is to be grown.

    Raises:
        MismatchError: it is partitioned and the new collection would not be, or the reverse; or its
            encoders, templates or weights differ from those of `made_from`.
        CollectionError: it is not there, or cannot be read.
    """
    found = None if base.url.startswith(hub.PREFIX) else read_published(base)
    if found is None:  # on the Hub, or missing, which this says
        manifest = collections.read_manifest(base.url, storage_options=base.storage_options)
        found = Published(fmt.undivided(manifest, base.url))
    check_kind_of_base(found, base.url, spec)
    check_same_encoders(base.url, found.manifest, made_from)
