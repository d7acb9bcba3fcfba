"""Arguments of the verbs that use a finished collection. Imports nothing but argparse."""

import argparse
from collections.abc import Callable
from typing import Any

METHODS = ("fossil", "freeda", "vocseg", "retclip", "corrclip", "rns")
"""Methods that need a collection and no `ovref train`."""
TRAINED = ("clip_rc",)
"""Methods that take what `ovref train` wrote in place of a collection."""
FORMATS = ("overlay", "labels", "coco", "panoptic")

LAYOUTS = ("prototypes", "segrag", "corrclip", "coco", "exemplars")
CONVERTED = ("fcclip", "ovseg")
SOURCES = ("arrays", "freeda", "corrclip")

Add = Callable[..., argparse.ArgumentParser]


def add_tools(add: Add) -> None:
    """Adds the verbs; `add` takes a verb's name and what it does."""
    segment = add("segment", "segment photographs with a collection")
    segment.add_argument(
        "collection",
        help="folder or URL; with --method clip_rc the output of ovref train, or miniature:clip_rc",
    )
    segment.add_argument(
        "images", nargs="+", metavar="IMAGES", help="files, folders or patterns, local or URLs"
    )
    segment.add_argument(
        "--classes", required=True, metavar="LIST",
        help="names separated by commas; a text file, one class per line, synonyms after ';'; "
        "or a published set, such as ade150 or voc21:fcclip",
    )  # fmt: skip
    segment.add_argument("--output", required=True, metavar="URL", help="folder or URL to write to")
    segment.add_argument(
        "--method", choices=(*METHODS, *TRAINED), default="fossil", help="default: fossil"
    )
    segment.add_argument(
        "--proposer", default="", metavar="KIND",
        help="masks: opencut (default, of the collection's own features), none, "
        "mask_former:MODEL, sam_grid:MODEL or fcclip:FOLDER (retclip, vocseg, corrclip)",
    )  # fmt: skip
    segment.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the method, such as n=40 or k=5; may be repeated",
    )  # fmt: skip
    segment.add_argument(
        "--formats", type=_formats, default=["overlay", "labels", "coco"], metavar="F,F",
        help=f"any of {', '.join(FORMATS)}; default: overlay,labels,coco",
    )  # fmt: skip
    segment.add_argument(
        "--things", metavar="LIST",
        help="classes split into instances: names separated by commas, all or none; default: the "
        "things of a published set",
    )  # fmt: skip
    segment.add_argument(
        "--workers", type=number(int, 1), default=1, metavar="N", help="processes; default: 1"
    )
    segment.add_argument("--device", metavar="NAME", help="cpu, cuda, ...; default: a GPU if any")
    search = add("search", "find references by words, by an image or by a region of one")
    search.add_argument("collection", help="folder or URL")
    search.add_argument("text", nargs="*", metavar="WORD", help="a noun or free text")
    search.add_argument("--image", metavar="FILE", help="search for this image instead")
    search.add_argument(
        "--box", type=_box, metavar="X0,Y0,X1,Y1", help="search for a box of the image, in pixels"
    )
    search.add_argument("--mask", metavar="FILE", help="search for the bright pixels of this mask")
    search.add_argument("-k", type=number(int, 1), default=12, metavar="N", help="default: 12")
    search.add_argument("--sheet", metavar="PNG", help="draw the crops with their masks")
    search.add_argument(
        "--build", metavar="URL",
        help="output of the build that made the images; default: the images published with the "
        "collection, or its parent folder",
    )  # fmt: skip
    search.add_argument("--json", action="store_true", help="for programs")
    coverage = add("coverage", "report how well a collection covers each class, the weakest first")
    coverage.add_argument("collection", help="folder or URL")
    coverage.add_argument("--classes", required=True, metavar="LIST", help="as of segment")
    coverage.add_argument(
        "--clip", action="store_true",
        help="ask CLIP, too, whether the references' images show their classes",
    )  # fmt: skip
    coverage.add_argument(
        "--build", metavar="URL", help="output of the build that made the images; as of search"
    )
    coverage.add_argument("--json", action="store_true", help="for programs")
    publish = add("publish", "publish a collection with a card")
    publish.add_argument("collection", help="folder or URL")
    publish.add_argument("target", help="folder, s3://bucket/name or hf://user/name")
    publish.add_argument("--title", default="", help="card title; default: the target's name")
    publish.add_argument(
        "--no-images", action="store_true", help="publish without the references' images"
    )
    publish.add_argument("--build", metavar="URL", help="output of the build that made it")
    publish.add_argument(
        "--evaluation", metavar="FILE", help="evaluation.json for the card; default: the build's"
    )
    publish.add_argument("--replace", action="store_true", help="replace another one")
    publish.add_argument("--int8", action="store_true", help="store embeddings in half the bytes")
    export = add("export", "write a collection in the layout of another program")
    export.add_argument("collection", help="folder or URL")
    export.add_argument("layout", choices=LAYOUTS)
    export.add_argument("output", metavar="FOLDER")
    export.add_argument(
        "-k", type=number(int, 1), default=5, metavar="N", help="exemplars; default: 5"
    )
    export.add_argument("--nouns", metavar="LIST", help="with commas; default: the vocabulary")
    export.add_argument("--name", default="ovref", help="of a CorrCLIPv2 bank; default: ovref")
    _add_models(export)
    export.add_argument("--build", metavar="URL", help="output of the build that made the images")
    imported = add("import", "make a collection from vectors or from another program's bank")
    imported.add_argument("layout", choices=SOURCES)
    imported.add_argument(
        "files", nargs="+", metavar="FILE",
        help="arrays: VISUAL.npy TABLE.parquet [TEXTUAL.npy]; freeda: prototype_embeddings.tar "
        "knn.index; corrclip: the folder memory_bank",
    )  # fmt: skip
    imported.add_argument("--output", required=True, metavar="URL", help="of the collection")
    imported.add_argument(
        "--visual", required=True, metavar="MODEL",
        help="model of the visual vectors: a transformers model, open_clip:MODEL, or own:NAME",
    )  # fmt: skip
    imported.add_argument("--size", type=number(int, 1), default=518, metavar="PIXELS")
    imported.add_argument("--text", required=True, metavar="MODEL", help="the CLIP model")
    imported.add_argument("--classes", metavar="LIST", help="names for a bank, as in segment")
    imported.add_argument("--name", default="own", help="of the bank, or of the source")
    imported.add_argument(
        "--images", metavar="URL", help="of arrays: folder of the files in the table's column image"
    )
    _add_models(imported)
    imported.add_argument("--licence", action="append", default=[], metavar="NAME: LICENCE")
    imported.add_argument("--replace", action="store_true", help="replace another one")
    _add_convert(add)


def add_grow(add: Add) -> argparse.ArgumentParser:
    """Adds the verb `grow`."""
    grow = add(
        "grow", "build references for the classes that a collection has too few of",
        usage="ovref grow COLLECTION --classes LIST --target N --output URL [options] "
        "[key=value ...]",
    )  # fmt: skip
    grow.add_argument("place", metavar="COLLECTION", help="or the output of its build")
    grow.add_argument("--classes", required=True, metavar="LIST", help="as of segment")
    grow.add_argument(
        "--target", required=True, type=number(int, 1), metavar="N",
        help="references that each class should have",
    )  # fmt: skip
    grow.add_argument(
        "--output", required=True, metavar="URL",
        help="of the build of the new captions; the grown collection is in it",
    )  # fmt: skip
    grow.add_argument(
        "--templates", metavar="FILE", help="of captions with {} for the class, one a line"
    )
    grow.add_argument(
        "--captions", action="append", default=[], metavar="URL",
        help="captions that are taken first: a text file or another corpus; may be repeated",
    )  # fmt: skip
    grow.add_argument(
        "--config", metavar="NAME", help="of the build; default: the settings that made it"
    )
    grow.set_defaults(overrides=[])
    return grow


def _add_convert(add: Add) -> None:
    """Adds the verb `convert`, which has a verb of its own for each kind of thing."""
    convert = add("convert", "convert another program's trained model, or divide a collection")
    kinds = convert.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind in CONVERTED:
        text = f"convert the trained model of {kind} for the segmenters"
        model = kinds.add_parser(kind, help=text, description=f"{text[0].upper()}{text[1:]}.")
        model.add_argument("checkpoint", metavar="FILE", help=".pth or .safetensors, as released")
        model.add_argument("output", metavar="FOLDER")
        if kind == "fcclip":
            model.add_argument(
                "--clip", default="convnext_large_d_320", metavar="NAME",
                help="open_clip's name of its CLIP: convnext_large_d_320 (default), "
                "RN50x64-quickgelu, ...",
            )  # fmt: skip
        model.add_argument(
            "--classes", required=True, metavar="LIST",
            help="what it was trained on, as of segment; the released ones: coco_panoptic:fcclip, "
            "coco_stuff",
        )  # fmt: skip
    text = "divide a collection into partitions that one machine can hold"
    collection = kinds.add_parser(
        "collection", help=text, description=f"{text[0].upper()}{text[1:]}.",
        usage="ovref convert collection OLD NEW --partition-references N [engine.key=value ...]",
        epilog="engine.key=value sets where it runs, as for ovref reduce; work=FOLDER is the work "
        "folder of each machine.",
    )  # fmt: skip
    collection.add_argument("source", metavar="OLD", help="folder, s3://bucket/name or hf://...")
    collection.add_argument("output", metavar="NEW", help="empty folder or s3://bucket/name")
    collection.add_argument(
        "--partition-references", required=True, type=number(int, 1), metavar="N",
        help="most references of a partition, unless one noun has more",
    )  # fmt: skip
    collection.set_defaults(overrides=[])


def _add_models(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--clip-name", default="metaclip_l", help="CorrCLIPv2's name of its CLIP")
    sub.add_argument("--vfm-name", default="dinov2", help="and of its vision model")


def _formats(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not set(found) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(FORMATS)}, found {text}")
    return found


def _box(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"must be four numbers x0,y0,x1,y1, found {text}")
    return numbers


_box.__name__ = "box"


def number(kind: type, least: int = 0) -> Callable[[str], Any]:
    """A parser of finite numbers of a type."""

    def read(text: str) -> Any:
        found = kind(text)
        if not least <= found < float("inf"):
            raise argparse.ArgumentTypeError(f"must be {least} or more, found {text}")
        return found

    read.__name__ = kind.__name__  # named by argparse if `text` is not a number
    return read
