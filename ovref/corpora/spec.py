"""Settings of a caption corpus: location, format, and which captions to read."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from fsspec import AbstractFileSystem

from ovref.config import STRICT
from ovref.corpora.listing import MAGIC, entries, matches, open_place, shown
from ovref.errors import InputError
from ovref_inference.places import describe, store_errors
from ovref_inference.ranges import require_at_least, require_within

Format = Literal[
    "auto",
    "coco",
    "csv",
    "tsv",
    "jsonl",
    "parquet",
    "text",
    "webdataset",
    "imagefolder",
    "class_folders",
    "open_images",
    "miniature",
    "mixture",
]

SUFFIXES = {
    ".json": "coco",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".tar": "webdataset",
}
"""File suffix -> format; `.gz` may follow except for Parquet."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the metadata file with the captions of an image folder."""

LABELLED = ("class_folders", "open_images")
"""Formats with labels only."""

MIXTURE, LISTS = "mixture", (".yaml", ".yml")
"""Format of a list of corpora, and how its file is called; see `corpora.mixture`."""
MINIATURE = "miniature:"
"""Path prefix of a corpus of the miniature's scenes, followed by the split."""


NO_IMAGE_COLUMN = (
    "coco", "text", "webdataset", "imagefolder", "class_folders", "open_images", "miniature",
    "mixture",
)  # fmt: skip
"""Formats without an image column."""
FOLDERS = ("imagefolder", "class_folders")
"""Formats that read a folder of images and all folders below."""


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """Labels of a labelled set, which take the place of captions."""

    __pydantic_config__ = STRICT

    dataset: str = ""
    """Name of a published data set (`ade150`, `ade_panoptic`, `coco_stuff`, ..., as for
    `evaluate`); `path` is then the folder that contains it, and its label maps are the masks of the
    labels. Empty for other labelled sets."""
    split: Literal["train", "val"] = "train"
    """Split of `dataset`."""
    names: str = ""
    """Class names: for `dataset` one of its class lists or a text file, as for `evaluate`; for
    `open_images` the file of class descriptions."""
    separator: str = ","
    """Separator of the labels in a table cell. Lists in JSON or Parquet need none."""
    synonyms: bool = False
    """Whether all names of a class, separated by `;`, are nouns of its regions. False takes only
    the first."""
    min_confidence: float = 1.0
    """For `open_images`: minimum confidence of a label. 1.0 takes only labels verified by people;
    0.7 also takes machine-generated labels of that confidence. Labels rejected by people never
    count."""

    def __post_init__(self) -> None:
        if not self.separator.strip():
            raise ValueError("separator must not be blank")
        require_within("min_confidence", self.min_confidence, 0, 1, "(]")


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """A caption corpus and how to read it."""

    __pydantic_config__ = STRICT

    path: str
    """A file, a folder, or a pattern with `*`, `?`, `[...]` or `**`; a local path or a URL such as
    `s3://bucket/part-*`. Symbolic links are followed; hidden files are ignored. `miniature:train`
    is the first `limit` scenes of the miniature. A .yaml file lists several corpora, each with its
    settings, of which the captions alternate in the proportion of their `weight`."""
    format: Format = "auto"
    """`auto` decides by file names; `coco` is the official JSON layout of COCO captions;
    `imagefolder` is a folder of images, each with a .txt of captions (one per line) beside it, or
    with a `metadata.jsonl`, `.csv` or `.parquet` with the columns `file_name` and the caption."""
    corpus_id: str | None = None
    """Part of every key. Default: name of the file, or of the folder that contains the files."""
    caption_column: str | int | None = None
    """Column or JSON field of the caption; a number (from 0) for a CSV or TSV file without a header
    line. Default: the first of `caption`, `text`, `TEXT`, `title`, `sentence` that exists."""
    image_column: str | int | None = None
    """Image column: encoded bytes, or a path relative to `images`. Read only by builds that ground
    captions."""
    images: str | None = None
    """Folder or URL prefix of the image files that the corpus refers to."""
    labels: LabelSpec | None = None
    """Reads a labelled set, whose labels are the nouns: with `labels.dataset` a published data set,
    with the format `coco` the categories and masks of an instances file, with `open_images` the CSV
    file of image-level labels of Open Images, with `class_folders` one folder of images per class;
    in other formats, `caption_column` is then the column of labels."""
    licence: str | None = None
    """Licence of captions and images, for the manifest of the collection."""
    limit: int | None = None
    """Number of usable captions to read; None reads all."""
    draws: int = 1
    """Images to generate per caption, each with its own key."""
    max_characters: int = 1000
    """Longer captions are dropped as `caption_too_long`."""
    repeats: bool = False
    """Whether a caption that several images have is drawn once for each, as FOSSIL does, and not
    once in all. For COCO's captions, which name their images, in builds that generate images; where
    the images themselves are read, each has its own caption anyway."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a file, a folder or a pattern, found an empty string")
        if self.corpus_id == "":
            raise ValueError("corpus_id must not be empty; leave it out for the default")
        for name in ("limit", "draws", "max_characters"):
            value = getattr(self, name)
            if value is not None:
                require_at_least(name, value, 1)
        for name in ("caption_column", "image_column"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} counts columns from 0, found {value}")
        self._check_labels()
        if self.image_column is not None and self.format in NO_IMAGE_COLUMN:
            raise ValueError(f"image_column has no meaning in the format {self.format}")
        if self.images is not None and self.format in ("webdataset", *FOLDERS, "miniature"):
            raise ValueError(
                f"images has no meaning in the format {self.format}, which has its own"
            )

    def _check_labels(self) -> None:
        labels = self.labels
        if self.repeats and (labels is not None or self.format not in ("auto", "coco", MIXTURE)):
            raise ValueError("repeats is for COCO's captions, which name their images")
        if labels is None:
            if self.format in LABELLED:
                raise ValueError(f"the format {self.format} has labels and no captions: set labels")
            return
        if labels.dataset and (self.format != "auto" or self.images or self.caption_column):
            raise ValueError(
                "with labels.dataset, path is the folder of the set: leave out format, images and "
                "caption_column"
            )
        if is_mixture(self) and not labels.dataset:
            raise ValueError(f"a list of corpora has no labels, found {self.path}")
        if self.format in ("text", "miniature"):
            raise ValueError(f"the format {self.format} has no labels")
        if (self.format == "open_images") != bool(labels.names) and not labels.dataset:
            raise ValueError(
                "labels.names is for labels.dataset, and for the format open_images, which needs it"
            )


def is_mixture(spec: CorpusSpec) -> bool:
    """Whether a corpus is a list of others."""
    return spec.format == MIXTURE or (spec.format == "auto" and spec.path.endswith(LISTS))


def corpus_id(spec: CorpusSpec) -> str:
    """The corpus id in keys: `spec.corpus_id`, or the name of the file or folder."""
    if spec.corpus_id is not None:
        return spec.corpus_id
    if spec.path.startswith(MINIATURE):
        return spec.path.replace(":", "_")
    if spec.labels is not None and spec.labels.dataset:
        return f"{spec.labels.dataset}_{spec.labels.split}"
    path = PurePosixPath(spec.path.partition("://")[2] or spec.path)
    while "*" in path.name:
        path = path.parent
    name = path.name
    for suffix in (".gz", *SUFFIXES, *LISTS):
        name = name.removesuffix(suffix)
    return name or "corpus"


def corpus_files(spec: CorpusSpec) -> tuple[AbstractFileSystem, list[tuple[str, str]]]:
    """The corpus's files in order of name, each with its format.

    Returns:
        The file system, and (path on it, format) of each file.

    Raises:
        InputError: nothing exists at the path, it cannot be listed, or it has no file of the format
            or files of several formats.
    """
    try:
        fs, root = open_place(spec.path)
        is_pattern = "*" in root
        if not is_pattern and fs.isdir(root):
            names = [item["name"] for item in entries(fs, root) if item["type"] != "directory"]
        elif not is_pattern and fs.exists(root):
            names = [root]
        else:
            is_pattern = any(mark in root for mark in MAGIC)
            names = matches(fs, root) if is_pattern else []
        if spec.format in FOLDERS and not fs.isdir(root):
            raise InputError(f"the format {spec.format} reads a folder, found {shown(spec.path)}")
    except store_errors(ValueError) as error:
        raise InputError(
            f"cannot look for the corpus at {shown(spec.path)}: {describe(error)}"
        ) from error
    if spec.format == "class_folders":
        return fs, [(root, spec.format)]
    if not names and spec.format != "imagefolder":
        raise InputError(
            f"no caption corpus at {shown(spec.path)}: no such file, or no file in it. Check the "
            f"path, the credentials and, for a pattern, that its files are there; for images in "
            f"folders of this folder, name the format: imagefolder"
        )
    one_file = names == [root]
    if _is_imagefolder(spec, one_file or is_pattern, names):
        return fs, [(root, "imagefolder")]
    found = []
    for name in names:
        written = SUFFIXES.get(PurePosixPath(name.removesuffix(".gz")).suffix.lower())
        if spec.format == "auto" and written:
            found.append((name, written))
        elif spec.format != "auto" and (one_file or is_pattern or written == spec.format):
            found.append((name, spec.format))
    formats = sorted({written for _, written in found})
    if not found:
        wanted = "known" if spec.format == "auto" else spec.format
        raise InputError(
            f"the corpus {shown(spec.path)} holds no file of a {wanted} format (first file: "
            f"{names[0]}). "
            f"Known endings are {', '.join(SUFFIXES)}, with or without .gz; name the format with "
            f"`format` if the files are called otherwise"
        )
    if len(formats) > 1:
        raise InputError(
            f"the corpus {spec.path} mixes the formats {', '.join(formats)}. Name one with "
            f"`format`, or point `path` at one kind of file, for instance {spec.path}/*.parquet"
        )
    return fs, found


def _is_imagefolder(spec: CorpusSpec, by_name: bool, names: list[str]) -> bool:
    if spec.format != "auto" or by_name:
        return spec.format == "imagefolder"
    return any(PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in names)
