"""`ovref publish`: selects the parts of a build that are published with its collection."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovref.errors import InputError
from ovref.exchange import publishing
from ovref.exchange.exemplars import best_references
from ovref.exchange.picture_files import (
    PublishedPictures,
    has_pictures,
    write_image_rows,
    write_pictures,
)
from ovref.records import ImageRecord
from ovref.storage.file_store import Store
from ovref_inference.collection import store as collections
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_pipelines.output import BuildOutput, open_build
from ovref_pipelines.verbs.reference_images import build_of, reference_sheet

SAMPLES = 18
"""Number of crops on the card."""
EVALUATION = "evaluation/evaluation.json"


def publish(
    collection_url: str,
    target: str,
    *,
    title: str,
    images: bool,
    build: str | None,
    evaluation: str | None,
    replace: bool,
    int8: bool,
) -> dict[str, int]:
    """See `ovref_pipelines.api.publish`."""
    manifest = collections.read_manifest(collection_url)
    measured = _evaluation(collection_url, manifest.fingerprint, build, evaluation)
    beside = images and build is None and has_pictures(collection_url)
    output = _build(build_of(collection_url, build)) if images and not beside else None

    def write(folder: Path) -> Iterator[str]:
        if not images:
            return
        with ReferenceCollection.open(collection_url) as collection:
            keys = frozenset(collection.to_table(["key"]).column("key").to_pylist())
            if output is not None:
                yield from write_pictures(_records(output), keys, folder)
            else:
                yield from write_image_rows(_published(collection_url, keys), folder)
            (folder / publishing.SAMPLES).write_bytes(_samples(collection, build))
            yield publishing.SAMPLES

    return publishing.publish(
        collection_url, target, title=title, evaluation=measured, write_pictures=write,
        replace=replace, int8=int8,
    )  # fmt: skip


def _build(url: str) -> BuildOutput:
    try:
        return open_build(url)
    except InputError as error:
        raise InputError(
            f"the images are not here: {error}. Give the output of the build that made them with "
            "--build, or publish without them by --no-images"
        ) from error


def _evaluation(collection_url: str, fingerprint: str, build: str | None, path: str | None) -> Any:
    if path is not None:
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the evaluation {path}: {error}") from error
    store = Store.open(build_of(collection_url, build))
    content = store.read_if_there(EVALUATION)
    if content is None:
        return None
    try:
        found = json.loads(content)
    except ValueError as error:
        raise InputError(
            f"{store.url}/{EVALUATION} is damaged: {error}; evaluate again, or name another with "
            "--evaluation"
        ) from error
    return found if publishing.measured_of(found) == fingerprint else None


def _records(output: BuildOutput) -> Iterator[ImageRecord]:
    step = output.step("images")
    for shard in step.committed():
        for record in step.read(shard):
            assert isinstance(record, ImageRecord)
            yield record


def _published(collection_url: str, keys: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The images that lie beside the collection, with the regions of these references."""
    for row in PublishedPictures(collection_url).rows():
        regions = [one for one in row["regions"] if f"{row['key']}#{one['number']}" in keys]
        if regions:
            yield row | {"regions": regions}


def _samples(collection: ReferenceCollection, build: str | None) -> bytes:
    """A sheet with the most typical reference of each of some nouns."""
    order = collection.noun_counts.argsort(kind="stable")[::-1][:SAMPLES]
    nouns = [collection.nouns[row] for row in order if collection.noun_counts[row] > 0]
    ids = [found[0] for _, found in best_references(collection, nouns, 1)]
    rows = collection.rows(ids)
    titles = [(row["noun"], row["caption"]) for row in rows]
    return reference_sheet(collection.url, rows, titles, build)[0]
