"""`ovref export` and `ovref import`: layouts of other programs, by name."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovref.errors import InputError
from ovref.exchange import exports, imports
from ovref.exchange.class_lists import read_classes
from ovref.exchange.exports import Exported
from ovref.exchange.own_arrays import collection_from_arrays, read_arrays
from ovref.exchange.picture_files import Picture
from ovref.stages.embed import Embed
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_pipelines.verbs.reference_images import reference_pictures

FILES = {"arrays": (2, 3), "freeda": (2, 2), "corrclip": (1, 1)}
"""Minimum and maximum number of files of each layout."""


def export(
    collection_url: str, layout: str, folder: str, *, k: int, nouns: Sequence[str] | None,
    name: str, clip: str, vfm: str, build: str | None,
) -> Exported:  # fmt: skip
    """Writes a collection in one of the layouts of `exports`.

    Raises:
        InputError: the folder is not empty, or the layout's function refuses the collection.
    """
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{place} is not empty: export into a new folder")
    with ReferenceCollection.open(collection_url) as collection:

        def pictures(rows: Sequence[dict[str, Any]]) -> list[Picture | None]:
            return reference_pictures(collection_url, rows, build)

        if layout == "prototypes":
            return exports.export_prototypes(collection, place)
        if layout == "segrag":
            return exports.export_segrag(collection, place)
        if layout == "corrclip":
            return exports.export_corrclip(
                collection, pictures, place, name=name, clip=clip, vfm=vfm
            )
        return exports.export_exemplars(
            collection, pictures, place, k=k, nouns=nouns, coco=layout == "coco"
        )


def import_bank(
    layout: str, files: Sequence[str], output: str, *, visual: str, size: int, text: str,
    classes: str | None, name: str, clip: str, vfm: str, licences: Sequence[str], replace: bool,
    images: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Makes a collection from arrays or from another program's bank.

    Returns:
        As of `collection_from_arrays`.

    Raises:
        InputError: files are missing, too many or inconsistent; or a bank has no class list.
        ModelError: the text encoder cannot be loaded.
    """
    least, most = FILES[layout]
    if not least <= len(files) <= most:
        raise InputError(f"{layout} is read from {least} to {most} files, found {len(files)}")
    if layout != "arrays" and images is not None:
        raise InputError(f"{layout} does not say which images its references are of: no --images")
    if layout != "arrays" and not classes:
        raise InputError(f"{layout} has no nouns: give their names with --classes")
    embed = Embed(visual=_visual(visual, size), text=TextEncoderConfig(model=text))
    from ovref_inference.encoders import load_text_encoder

    texts = load_text_encoder(embed.text)
    with tempfile.TemporaryDirectory() as scratch:
        if layout == "arrays":
            arrays = read_arrays(files[0], files[1], files[2] if len(files) > 2 else None)
        else:
            names = read_classes(classes or "").query_names
            if layout == "freeda":
                arrays = imports.read_freeda(
                    Path(files[0]), Path(files[1]), names, texts, Path(scratch)
                )
            else:
                arrays = imports.read_corrclip(Path(files[0]), name, clip, vfm, names, texts)
        return collection_from_arrays(
            output, arrays, embed, texts=texts, name=name, licences=licences, replace=replace,
            images=images,
        )  # fmt: skip


def _visual(model: str, size: int) -> VisualEncoderConfig:
    library, colon, rest = model.partition(":")
    if library == "open_clip" and colon:
        return VisualEncoderConfig(model=rest, library="open_clip", size_hw=(size, size))
    return VisualEncoderConfig(model=model, size_hw=(size, size))
