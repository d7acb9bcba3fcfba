"""Loads the part-of-speech tagger that finds the nouns of captions."""

from typing import Any

import spacy
from spacy.language import Language

from ovref.errors import ModelError
from ovref_inference.models import miniature_folder

MINIATURE = "miniature:tagger"
UNNEEDED = ("ner", "parser", "lemmatizer", "senter")
"""Components that cost time and add nothing to the tags; `nouns.singular` does the lemmas."""


def load_tagger(name: str = MINIATURE, version: str | None = None) -> Language:
    """A spaCy pipeline that sets `token.tag_` to Penn Treebank tags.

    Args:
        name: `miniature:tagger` for the one of `ovref_miniature`; else an installed spaCy package
            such as `en_core_web_sm`, or a folder that `nlp.to_disk` wrote.
        version: of the pipeline, as its `meta.json` has it; None for any.

    Raises:
        ModelError: no such pipeline is installed, it cannot be read, it has another version, or it
            has no tagger.
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
            f"one, or change `tagger_version` and build again under another fingerprint"
        )
    tagger: Any = nlp.get_pipe("tagger") if nlp.has_pipe("tagger") else None
    tags = set(tagger.labels) if tagger is not None else set()
    if not {"NN", "NNS"} <= tags:
        raise ModelError(
            f"the spaCy pipeline {name!r} cannot find nouns: expected a tagger with the Penn "
            f"Treebank tags NN and NNS, found the components {', '.join(nlp.pipe_names) or 'none'}"
        )
    return nlp
