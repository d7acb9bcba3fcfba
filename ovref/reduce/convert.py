"""An undivided collection to a partitioned one, without its shards and without a model.

Its rows take the place of the shards in `partitioned`, and its vocabulary that of the text encoder;
indexes and prototypes are made anew.
"""

from pathlib import Path
from typing import Any

from ovref import config
from ovref.errors import MismatchError
from ovref.reduce.collection_rows import rows_of_collection
from ovref.reduce.made_from import of_collection
from ovref.reduce.partitioned import PartitionedJob, make_partitions
from ovref.reduce.phases import Report, RunTasks, in_process
from ovref.reduce.published import PARTITIONS, read_published
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt

KEPT = ("dropped_before", "filter", "noun_agreement", "flagged", "lost_nouns")
"""What the summary of the earlier reduction says of how its references were chosen."""


def convert_collection(url: str, partition_references: int, **options: Any) -> dict[str, Any]:
    """Makes a partitioned collection of the references of the undivided one at `url`.

    Args:
        partition_references, options: as in `conversion`.

    Returns:
        As `collection.reduce_collection`. What filters dropped is what they dropped when the
        collection at `url` was made, and `deleted`.

    Raises:
        InputError, CollectionError, MismatchError, ConfigError: as `conversion`; also if the
            collection is damaged or was changed meanwhile.
    """
    return make_partitions(conversion(url, partition_references, **options))


def conversion(
    url: str,
    partition_references: int,
    *,
    output: Store,
    work: str | Path,
    run_tasks: RunTasks = in_process,
    report: Report = lambda phase, done, total: None,
    storage_options: dict[str, Any] | None = None,
) -> PartitionedJob:
    """What `partitioned.make_partitions` makes a partitioned collection of. Writes nothing.

    Everything but their ids is kept, embeddings bit for bit; deleted ones are left out. Of a
    collection in int8 the 8-bit numbers are taken, and prototypes made of these. The new collection
    names the same inputs, so that it grows like one that was reduced from them.

    Args:
        partition_references: as in `ReduceSpec`.
        output: an empty place, or one where the same conversion was killed.
        work, run_tasks, report: as in `collection.reduce_collection`.
        storage_options: fsspec's options for `url`.

    Raises:
        InputError: it is partitioned already, or all its references are deleted.
        CollectionError: it cannot be read.
        MismatchError: `output` is not empty.
        ConfigError: `partition_references` is out of range, or the manifest has a setting that
            this version does not know.
    """
    before = read_published(output)
    rows, manifest = rows_of_collection(url, storage_options or {})
    settings = {
        **manifest.build.get("reduce", {}).get("fields", {}),
        "prototypes": manifest.prototypes,
        "embeddings": manifest.embeddings,
        "textual_embeddings": manifest.textual_embeddings,
        "partition_references": partition_references,
    }
    job = PartitionedJob(
        inputs=[rows],
        spec=config.parse(ReduceSpec, settings, f"the conversion of {url}"),
        made_from=of_collection(manifest),
        embed_nouns=rows.embeddings_of,
        output=output,
        before=before,
        work=Path(work),
        run_tasks=run_tasks,
        report=report,
        build=_build(manifest, rows.rows),
        summary=_summary(manifest, rows.rows),
    )
    _check_empty(job, url)
    return job


def _build(manifest: fmt.Manifest, kept: int) -> dict[str, Any]:
    """The history of the references for the new manifest."""
    changed = ("reduce", "embed", "summary", "provenance")
    history = {name: value for name, value in manifest.build.items() if name not in changed}
    deleted = manifest.counts["references"] - kept
    converted = {"from": manifest.fingerprint, "to": "partitions", "deleted": deleted}
    return {"inputs": [], **history, "converted": converted}


def _summary(manifest: fmt.Manifest, kept: int) -> dict[str, Any]:
    before = manifest.build.get("summary", {})
    summary = {name: before[name] for name in KEPT if name in before}
    total = manifest.counts["references"]
    if kept < total:
        left_out = {"filter": "deleted", "before": total, "after": kept}
        summary["filter"] = [*summary.get("filter", ()), left_out]
    return summary


def _check_empty(job: PartitionedJob, url: str) -> None:
    """Raises MismatchError if there is anything at the output that this conversion has not made."""
    if job.before is not None:
        if job.before.manifest.fingerprint == job.wanted:
            return
        there, now = job.before.manifest.build, job.build["converted"]
        found, most = there.get("converted", {}), job.spec.partition_references
        if found.get("from") == now["from"]:
            divided_by = there["reduce"]["fields"]["partition_references"]
            if divided_by != most:
                raise MismatchError(
                    f"{job.output.url} was converted from {url} with --partition-references "
                    f"{divided_by}, now it is {most}: convert into a new folder"
                )
            raise MismatchError(
                f"{job.output.url} was converted from {url} when other references were deleted "
                f"there ({found['deleted']}, now {now['deleted']}): convert into a new folder, or "
                f"keep it and delete the same ones in it by `ovref tombstone {job.output.url}`"
            )
        raise MismatchError(
            f"{job.output.url} holds another collection (fingerprint "
            f"{job.before.manifest.fingerprint[:12]}): convert into a new folder"
        )
    names = {path.partition("/")[0] for path in job.output.list()} - {PARTITIONS}
    if other := sorted(name for name in names if not name.startswith("_")):
        raise MismatchError(
            f"{job.output.url} is not empty (it has {', '.join(other[:3])}): convert into a new "
            "folder"
        )
