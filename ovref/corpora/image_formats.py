"""Image corpora: folders of images with captions, and the miniature's scenes."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem
from PIL import Image

from ovref.corpora import formats
from ovref.corpora.formats import CorpusRow
from ovref.corpora.listing import walk
from ovref.corpora.spec import CAPTION_FILES, IMAGE_SUFFIXES, MINIATURE, CorpusSpec
from ovref.errors import InputError
from ovref.stored_images import decode_image

FILE_NAME = "file_name"
"""Column with the image path relative to the metadata file (Hugging Face's layout)."""

FIRST_SCENE = 4_000_000
"""Seed of a miniature corpus's first scene; no model was trained on these scenes."""


def read_imagefolder(spec: CorpusSpec, fs: AbstractFileSystem, root: str) -> Iterator[CorpusRow]:
    """The images below a folder, each with its captions, folder by folder in order of name.

    A metadata file (`metadata.jsonl`, `.csv` or `.parquet`, with the columns `file_name` and the
    caption) covers its folder and all folders below; images that it does not list are not part of
    the corpus. Elsewhere, the captions of `x.jpg` are the non-blank lines of `x.txt`, and an image
    without any is a record with an empty caption. Image names are relative to `root`.
    """
    root = root.rstrip("/")
    for folder, inside in walk(fs, root):
        inner = f"{folder}/".removeprefix(f"{root}/")
        files = [item["name"].rpartition("/")[2] for item in inside if item["type"] != "directory"]
        metadata = [name for name in CAPTION_FILES if name in files]
        if len(metadata) > 1:
            raise InputError(
                f"{folder} has {' and '.join(metadata)}; expected only one of them to hold the "
                f"captions"
            )
        if metadata:
            inside.clear()  # the folders below are not walked
            yield from _by_metadata(spec, fs, folder, inner, metadata[0])
        else:
            yield from _by_sidecar(fs, folder, inner, files)


def _by_metadata(
    spec: CorpusSpec, fs: AbstractFileSystem, folder: str, inner: str, metadata: str
) -> Iterator[CorpusRow]:
    read = {"jsonl": formats.read_jsonl, "csv": formats.read_table, "parquet": formats.read_parquet}
    spec = replace(spec, format="auto", image_column=FILE_NAME)
    for row in read[metadata.rpartition(".")[2]](spec, fs, f"{folder}/{metadata}"):
        named = isinstance(row.image, str) and row.image != ""
        yield CorpusRow(
            f"{inner}{metadata}:{row.line}", row.text, inner + row.image if named else b""
        )


def _by_sidecar(
    fs: AbstractFileSystem, folder: str, inner: str, files: list[str]
) -> Iterator[CorpusRow]:
    images, texts = dict[str, str](), []
    for name in files:
        path = PurePosixPath(name)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            # If there are both `x.jpg` and `x.png`, `x.txt` belongs to the first.
            images.setdefault(path.stem, name)
        elif path.suffix.lower() == ".txt":
            texts.append(name)
    for name in texts:
        image = images.pop(PurePosixPath(name).stem, "")
        lines = fs.cat_file(f"{folder}/{name}").removeprefix(b"\xef\xbb\xbf").splitlines()
        captions = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        for number, line in captions or [(1, b"")]:
            yield CorpusRow(f"{inner}{name}:{number}", line, image and inner + image)
    for name in sorted(images.values()):
        yield CorpusRow(inner + name, "", inner + name)


def read_miniature(spec: CorpusSpec) -> Iterator[CorpusRow]:
    """Scenes of a split of the miniature as PNG files with captions, rendered when read.

    Raises:
        InputError: there is no such split, or no `limit` (the number of scenes is infinite).
    """
    from ovref.miniature.scenes import SPLITS, render

    split = spec.path.removeprefix(MINIATURE)
    if split not in SPLITS or spec.limit is None:
        raise InputError(
            f"scenes of the miniature are the corpus {MINIATURE}train (or another of "
            f"{', '.join(SPLITS)}) with a limit, found {spec.path} with limit {spec.limit}"
        )
    for number in range(spec.limit):
        scene = render(FIRST_SCENE + number, split)
        file = io.BytesIO()
        Image.fromarray(scene.image_hwc).save(file, "PNG")
        yield CorpusRow(FIRST_SCENE + number, scene.caption, file.getvalue())


def identify_miniature(spec: CorpusSpec, scenes: int = 3) -> dict[str, Any]:
    """Identity of rendered scenes: a hash of the first ones' pixels and captions.

    Raises InputError like `read_miniature`.
    """
    digest = hashlib.sha256()
    first = spec.limit and min(spec.limit, scenes)
    for row in read_miniature(replace(spec, limit=first)):
        digest.update(decode_image(row.image).tobytes() + row.text.encode())
    return {"name": spec.path, "first_scenes_sha256": digest.hexdigest()}
