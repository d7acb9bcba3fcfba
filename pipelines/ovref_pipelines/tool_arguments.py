"""Arguments of the verbs that use a finished collection. Nothing is imported here but argparse."""

import argparse
from collections.abc import Callable

METHODS = ("fossil", "freeda", "vocseg", "retclip", "corrclip")
"""Methods that need a collection and no training."""
TRAINED = ("clip_rc",)
"""Methods that take what `ovref train` wrote in place of a collection."""
FORMATS = ("overlay", "labels", "coco", "panoptic")

LAYOUTS = ("prototypes", "segrag", "corrclip", "coco", "exemplars")
SOURCES = ("arrays", "freeda", "corrclip")

Add = Callable[..., argparse.ArgumentParser]


def add_tools(add: Add) -> None:
    """Adds the verbs; `add` takes a verb's name and what it does."""
    segment = add("segment", "segment photographs with a collection")
    segment.add_argument(
        "collection", help="folder or URL; with --method clip_rc the output of ovref train"
    )
    segment.add_argument(
        "images", nargs="+", metavar="IMAGES", help="files, folders or patterns, local or URLs"
    )
    segment.add_argument(
        "--classes", required=True, metavar="LIST",
        help="names with commas between them; a text file, one class a line, synonyms after ';'; "
        "or a set of the field, such as ade150 or voc21:fcclip",
    )  # fmt: skip
    segment.add_argument("--output", required=True, metavar="URL", help="folder or URL to write to")
    segment.add_argument(
        "--method", choices=(*METHODS, *TRAINED), default="fossil", help="default: fossil"
    )
    segment.add_argument(
        "--proposer", default="", metavar="KIND",
        help="masks: opencut (default, of the collection's own features), none, "
        "mask_former:MODEL or sam_grid:MODEL",
    )  # fmt: skip
    segment.add_argument(
        "--formats", type=_formats, default=["overlay", "labels", "coco"], metavar="F,F",
        help=f"of {', '.join(FORMATS)}; default: overlay,labels,coco",
    )  # fmt: skip
    segment.add_argument(
        "--things", metavar="LIST",
        help="classes whose parts are told apart: names with commas, all or none; default: those "
        "that a set of the field says",
    )  # fmt: skip
    segment.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="processes; default: 1"
    )
    segment.add_argument("--device", metavar="NAME", help="cpu, cuda, ...; default: a GPU if any")
    search = add("search", "find references by words, by an image or by a region of one")
    search.add_argument("collection", help="folder or URL")
    search.add_argument("text", nargs="*", metavar="WORD", help="a noun or free text")
    search.add_argument("--image", metavar="FILE", help="look for what is in this image instead")
    search.add_argument(
        "--box", type=_box, metavar="X0,Y0,X1,Y1", help="in this box of it, in pixels"
    )
    search.add_argument("--mask", metavar="FILE", help="under the bright pixels of this image")
    search.add_argument("-k", type=_positive, default=12, metavar="N", help="default: 12")
    search.add_argument("--sheet", metavar="PNG", help="draw the crops with their masks")
    search.add_argument(
        "--build", metavar="URL",
        help="output of the build that made the images; default: what was published with the "
        "collection, or the folder that it is in",
    )  # fmt: skip
    search.add_argument("--json", action="store_true", help="for programs")
    coverage = add("coverage", "say what a collection has for each class, the weakest first")
    coverage.add_argument("collection", help="folder or URL")
    coverage.add_argument("--classes", required=True, metavar="LIST", help="as of segment")
    coverage.add_argument("--json", action="store_true", help="for programs")
    publish = add("publish", "publish a collection, with a card, for others to open")
    publish.add_argument("collection", help="folder or URL")
    publish.add_argument("target", help="folder, s3://bucket/name or hf://user/name")
    publish.add_argument("--title", default="", help="of the card; default: the target's name")
    publish.add_argument(
        "--no-images", action="store_true", help="embeddings only, without the references' images"
    )
    publish.add_argument("--build", metavar="URL", help="output of the build that made it")
    publish.add_argument(
        "--evaluation", metavar="FILE", help="evaluation.json for the card; default: the build's"
    )
    publish.add_argument("--replace", action="store_true", help="even if another one is there")
    export = add("export", "write a collection in the layout of another program")
    export.add_argument("collection", help="folder or URL")
    export.add_argument("layout", choices=LAYOUTS)
    export.add_argument("output", metavar="FOLDER")
    export.add_argument("-k", type=_positive, default=5, metavar="N", help="exemplars; default: 5")
    export.add_argument("--nouns", metavar="LIST", help="with commas; default: the vocabulary")
    export.add_argument("--name", default="ovref", help="of a CorrCLIPv2 bank; default: ovref")
    _add_models(export)
    export.add_argument("--build", metavar="URL", help="output of the build that made the images")
    imported = add("import", "make a collection of vectors, or of another program's bank")
    imported.add_argument("layout", choices=SOURCES)
    imported.add_argument(
        "files", nargs="+", metavar="FILE",
        help="arrays: VISUAL.npy TABLE.parquet [TEXTUAL.npy]; freeda: prototype_embeddings.tar "
        "knn.index; corrclip: the folder memory_bank",
    )  # fmt: skip
    imported.add_argument("--output", required=True, metavar="URL", help="of the collection")
    imported.add_argument(
        "--visual", required=True, metavar="MODEL",
        help="what made the visual vectors: a model of transformers, open_clip:MODEL, or own:NAME",
    )  # fmt: skip
    imported.add_argument("--size", type=_positive, default=518, metavar="PIXELS")
    imported.add_argument("--text", required=True, metavar="MODEL", help="the CLIP model")
    imported.add_argument("--classes", metavar="LIST", help="names for a bank, as of segment")
    imported.add_argument("--name", default="own", help="of the bank, or of the source")
    _add_models(imported)
    imported.add_argument("--licence", action="append", default=[], metavar="NAME: LICENCE")
    imported.add_argument("--replace", action="store_true", help="even if another one is there")


def _add_models(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--clip-name", default="metaclip_l", help="CorrCLIPv2's name of its CLIP")
    sub.add_argument("--vfm-name", default="dinov2", help="and of its vision model")


def _formats(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not set(found) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(FORMATS)}, found {text}")
    return found


def _box(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"must be four numbers x0,y0,x1,y1, found {text}")
    return numbers


_box.__name__ = "box"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {text}")
    return number


_positive.__name__ = "int"  # which argparse names where the text is no number
