"""The verbs that use a finished collection: each takes its arguments and returns an exit code.

Separate from `commands`, because they must start fast: nothing that only builds need is imported.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ovref.errors import ConfigError, InputError
from ovref.locations import absolute, absolute_local
from ovref_inference.models import MINIATURE
from ovref_pipelines.console import Console
from ovref_pipelines.errors import FAILED


def _segment(options: Namespace, console: Console) -> int:
    from ovref.exchange.class_lists import read_classes
    from ovref.exchange.photographs import find_photographs
    from ovref_pipelines.verbs import segment

    place = options.collection
    job = segment.Job(
        collection=place if place.startswith(MINIATURE) else absolute(place, "collection"),
        output=absolute(options.output, "--output"),
        classes=read_classes(options.classes, options.things),
        method=options.method,
        proposer=options.proposer,
        formats=tuple(options.formats),
        settings=tuple(options.set),
        device=options.device,
    )
    photographs = find_photographs(options.images)
    summary = segment.segment(job, photographs, options.workers, console.say)
    console.show(segment.text(summary))
    return FAILED if not summary.segmented else 0


def _search(options: Namespace, console: Console) -> int:
    from ovref_inference.collection.reference_collection import ReferenceCollection
    from ovref_pipelines.verbs import search

    try:
        query = search.Query(
            text=" ".join(options.text), image=options.image, box_xyxy=options.box,
            mask=options.mask,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    if options.sheet and not options.sheet.lower().endswith(".png"):
        raise InputError(f"--sheet writes a PNG: {options.sheet} must end in .png")
    with ReferenceCollection.open(absolute(options.collection, "collection")) as collection:
        found = search.search(collection, query, options.k)
        console.show((search.as_json if options.json else search.text)(found))
        if options.sheet:
            sheet = absolute_local(options.sheet, "--sheet")
            build = absolute(options.build, "--build") if options.build else None
            drawn = search.write_sheet(collection, found, sheet, build)
            console.say(f"{sheet}: {drawn} of {len(found.rows)} references have an image")
    return 0


def _coverage(options: Namespace, console: Console) -> int:
    from ovref.exchange.class_lists import read_classes
    from ovref.exchange.coverage import coverage
    from ovref_inference.collection.reference_collection import ReferenceCollection
    from ovref_pipelines.verbs import coverage as shown
    from ovref_pipelines.verbs.reference_images import each_picture

    classes = read_classes(options.classes)
    place = absolute(options.collection, "collection")
    build = absolute(options.build, "--build") if options.build else None
    pictures = partial(each_picture, place, build=build) if options.clip else None
    with ReferenceCollection.open(place) as collection:
        found = coverage(collection, classes, pictures=pictures)
    console.show((shown.as_json if options.json else shown.text)(found))
    return 0


def _publish(options: Namespace, console: Console) -> int:
    from ovref_pipelines import api

    found = api.publish(
        options.collection, options.target, title=options.title, images=not options.no_images,
        build=options.build, evaluation=options.evaluation, replace=options.replace,
        int8=options.int8,
    )  # fmt: skip
    size = f"{found['bytes'] / 1e6:.1f} MB"
    console.show(f"published at {options.target}: {found['files']} files, {size}")
    return 0


def _export(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import exchange

    found = exchange.export(
        absolute(options.collection, "collection"), options.layout,
        absolute_local(options.output, "output"), k=options.k,
        nouns=[noun.strip() for noun in options.nouns.split(",")] if options.nouns else None,
        name=options.name, clip=options.clip_name, vfm=options.vfm_name,
        build=absolute(options.build, "--build") if options.build else None,
    )  # fmt: skip
    counts = ", ".join(f"{count} {what}" for what, count in found.counts.items())
    console.show(f"written to {found.folder}: {counts}")
    for reason in found.left_out[:5]:
        console.say(f"left out: {reason}")
    if len(found.left_out) > 5:
        console.say(f"left out: {len(found.left_out)} in all")
    return 0


def _import(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import exchange

    found = exchange.import_bank(
        options.layout, options.files, absolute(options.output, "--output"),
        visual=options.visual, size=options.size, text=options.text, classes=options.classes,
        name=options.name, clip=options.clip_name, vfm=options.vfm_name, licences=options.licence,
        replace=options.replace, images=options.images,
    )  # fmt: skip
    console.show(
        f"collection: {options.output}, {found['references']} references of {found['nouns']} nouns"
    )
    return 0


def _convert(options: Namespace, console: Console) -> int:
    if options.kind == "collection":
        return _convert_collection(options, console)
    from ovref.exchange import checkpoints
    from ovref.exchange.class_lists import read_classes

    output = Path(absolute_local(options.output, "output"))
    checkpoint = Path(absolute_local(options.checkpoint, "checkpoint"))
    names = read_classes(options.classes).query_names
    if options.kind == "ovseg":
        found = checkpoints.convert_open_mask_former(checkpoint, output, trained_names=names)
    else:
        found = checkpoints.convert_fcclip(
            checkpoint, output, clip=options.clip, trained_names=names
        )
    counts = ", ".join(f"{count} {what}" for what, count in found.items())
    console.show(f"written to {output}: {counts}")
    return 0


def _convert_collection(options: Namespace, console: Console) -> int:
    from ovref.config import load
    from ovref_pipelines.verbs import convert, show

    for text in options.overrides:
        if text.startswith("reduce."):
            raise ConfigError(
                f"{text}: a conversion keeps the settings that OLD was reduced with, except "
                "--partition-references; to change others, reduce its shards anew by `ovref reduce`"
            )
    config = load(convert.ConvertConfig, None, options.overrides)
    if config.engine.log == "json":
        console.use_json()
    output = absolute(options.output, "NEW")
    result = convert.convert(
        absolute(options.source, "OLD"), output, options.partition_references, config, console.say
    )
    console.show(show.collection_summary(result, output))
    return 0


TOOLS: dict[str, Callable[[Namespace, Console], Any]] = {
    "segment": _segment,
    "search": _search,
    "coverage": _coverage,
    "publish": _publish,
    "export": _export,
    "import": _import,
    "convert": _convert,
}
