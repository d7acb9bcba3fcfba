"""Reads all kinds of corpora: captions, labels, and the labelled sets of `ovref evaluate`.

In a labelled set, the labels of an image are its caption, and its label map provides the true masks
of the labels (`records.Segments`).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovref.class_files import SYNONYMS
from ovref.contract import Dropped
from ovref.corpora import CorpusSpec, identify, read_captions
from ovref.corpora.class_labels import names_of_label, text_of_labels
from ovref.corpora.corpus_identity import identify_files, identify_labels
from ovref.corpora.listing import shown
from ovref.corpora.readers import draws_of, limited
from ovref.corpora.spec import corpus_files, corpus_id
from ovref.errors import InputError
from ovref.identity import fingerprint
from ovref.records import Caption, Segments
from ovref.stored_images import decode_image, png_of

if TYPE_CHECKING:
    from ovref.evaluation.named_sets.opening import Example, LabelledSet


def read_corpus(spec: CorpusSpec, *, images: bool = False) -> Iterator[Caption | Dropped]:
    """The captions of a corpus, as in `ovref.corpora.read_captions`. Captions of a labelled set
    consist of its labels, which are also the nouns, and have masks.

    An image without labels is dropped as `no_labels`.

    Raises:
        InputError: see `read_captions`; or the labelled set is incomplete or invalid.
    """
    data = _labelled_set(spec)
    if data is None:
        yield from read_captions(spec, images=images)
        return
    corpus = corpus_id(spec)
    records = (_captions(spec, corpus, data, example, images) for example in data)
    yield from limited(spec.limit, records)


def identify_corpus(spec: CorpusSpec) -> dict[str, Any]:
    """The corpus's part of a fingerprint, as in `ovref.corpora.identify`. For a published data set,
    the names and sizes of all files are hashed, not their contents."""
    if spec.labels is None or not spec.labels.dataset:
        return identify(spec)
    data = _labelled_set(spec)
    if data is None:
        raise ValueError(f"{spec.labels.dataset} is a labelled set")
    return {
        "corpus_id": corpus_id(spec),
        "files": identify_files(data.folders),
        "images": fingerprint(list(data.ids)),
        "set": data.convention,
        "class_list": data.class_list.fingerprint,
        "labels": identify_labels(dataclasses.replace(spec.labels, names="")),
        "limit": spec.limit,
        "draws": spec.draws,
        "max_characters": spec.max_characters,
    }


def _labelled_set(spec: CorpusSpec) -> "LabelledSet | None":
    """Opens a corpus that is a labelled set; None for other corpora."""
    if spec.labels is None:
        return None
    # Imported here, because reading MATLAB files needs SciPy, which builds load late.
    from ovref.evaluation.named_sets.coco_masks import open_coco_masks
    from ovref.evaluation.named_sets.huggingface import open_any_set

    if spec.labels.dataset:
        root = _local(spec.path)
        return open_any_set(spec.labels.dataset, root, spec.labels.split, spec.labels.names)
    _, files = corpus_files(spec)
    if files[0][1] != "coco":
        return None
    if spec.images is None:
        raise InputError(f"set `images` to the image folder of {spec.path}")
    if len(files) > 1:
        raise InputError(f"expected one annotation file at {spec.path}, found {len(files)}")
    return open_coco_masks(_local(spec.images), _local(files[0][0]))


def _local(place: str) -> Path:
    if "://" in place:
        raise InputError(
            f"a labelled set with masks is read from the local disk, found {shown(place)}"
        )
    return Path(place).expanduser()


def _captions(
    spec: CorpusSpec, corpus: str, data: "LabelledSet", example: "Example", images: bool
) -> Dropped | Iterator[Caption]:
    """`spec.draws` captions of one image, or its drop."""
    if spec.labels is None:
        raise ValueError("a labelled set has labels")
    place = f"{corpus}:{example.id}"
    dropped_key = f"line:{place}".replace("#", "%23")
    segments_hw, classes = _segments(example)
    if not classes:
        return Dropped(dropped_key, "no_labels")
    present = sorted(set(classes))
    names = [
        names_of_label(SYNONYMS.join(data.class_list.classes[each]), spec.labels.synonyms)
        for each in present
    ]
    text, nouns, owners = text_of_labels(names)
    if len(text) > spec.max_characters:
        return Dropped(dropped_key, "caption_too_long")
    if not images:
        return draws_of(spec, corpus, text, place, None, nouns)
    of_class = dict(zip(present, owners, strict=True))
    segments = Segments(
        nouns=tuple(tuple(of_class[each]) for each in classes), map_png=png_of(segments_hw)
    )
    return draws_of(spec, corpus, text, place, _image_file(example), nouns, segments)


def _segments(example: "Example") -> tuple[np.ndarray, list[int]]:
    """(H, W) uint16 segment numbers from 1, 0 without a segment; and the class of each segment.

    Segments are instances and stuff if the set has them, otherwise one per class; crowd segments
    are left out.
    """
    from ovref.evaluation.named_sets.rules import IGNORE

    panoptic = example.panoptic
    if panoptic is None:
        ids_hw = example.label_hw
        known = {label: label for label in np.unique(ids_hw).tolist() if label != IGNORE}
    else:
        ids_hw = panoptic.ids_hw
        present = set(np.unique(ids_hw).tolist()) - panoptic.crowd
        known = {id_: label for id_, label in sorted(panoptic.labels.items()) if id_ in present}
    segments_hw = np.zeros(ids_hw.shape, dtype=np.uint16)
    for number, id_ in enumerate(known, start=1):
        segments_hw[ids_hw == id_] = number
    return segments_hw, list(known.values())


def _image_file(example: "Example") -> bytes:
    """The image file, or a new one if the set's protocol resizes images."""
    if example.image_path.is_file():
        file = example.image_path.read_bytes()
        if decode_image(file).shape == example.image_hwc.shape:
            return file
    return png_of(example.image_hwc)
