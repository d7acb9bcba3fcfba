"""Loads the part-of-speech tagger for extracting nouns from captions."""

from typing import Any

import spacy
from spacy.language import Language

from ovref.errors import ModelError
from ovref_inference.models import miniature_folder

MINIATURE = "miniature:tagger"
UNNEEDED = ("ner", "parser", "lemmatizer", "senter")
"""Components that take time and do not affect the tags; lemmas come from `ops.singular`."""


def load_tagger(name: str = MINIATURE, version: str | None = None) -> Language:
    """A spaCy pipeline that sets `token.tag_` to Penn Treebank tags.

    Args:
        name: `miniature:tagger` for the tagger of `ovref_miniature`, an installed spaCy package
            such as `en_core_web_sm`, or a folder written by `nlp.to_disk`.
        version: required version in the pipeline's `meta.json`; None for any.

    Raises:
        ModelError: the pipeline is not installed, cannot be read, has another version, or has no
            tagger.
    """
    try:
        place = miniature_folder(name) / "tagger" if name == MINIATURE else name
        nlp = spacy.load(place, exclude=UNNEEDED)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the noun tagger {name!r}: {error} Expected {MINIATURE!r}, a folder "
            f"written by spaCy, or an installed package of spaCy {spacy.about.__version__}; for "
            f"instance `python -m spacy download en_core_web_sm`"
        ) from error
    found = nlp.meta["version"]
    if version is not None and found != version:
        raise ModelError(
            f"the noun tagger {name!r} has version {found}, expected {version}. Install that "
            f"version, or change `tagger_version`, which gives the build another fingerprint"
        )
    tagger: Any = nlp.get_pipe("tagger") if nlp.has_pipe("tagger") else None
    tags = set(tagger.labels) if tagger is not None else set()
    if not {"NN", "NNS"} <= tags:
        raise ModelError(
            f"the spaCy pipeline {name!r} cannot find nouns: expected a tagger with the Penn "
            f"Treebank tags NN and NNS, found the components {', '.join(nlp.pipe_names) or 'none'}"
        )
    return nlp
