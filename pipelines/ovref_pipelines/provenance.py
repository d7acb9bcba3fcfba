"""What a collection was made from, for its manifest: corpus, settings, models, licences."""

import dataclasses
from typing import Any

from ovref.check_models import UNKNOWN as UNKNOWN_WEIGHTS
from ovref.check_models import CheckedModel, models_of
from ovref.corpora.mixture import licences_of_corpus
from ovref.corpora.spec import MINIATURE, corpus_id
from ovref.licences import UNKNOWN, licence_of
from ovref_pipelines import shipped
from ovref_pipelines.build_config import BuildConfig, output_of
from ovref_pipelines.folders import Folders
from ovref_pipelines.preflight import remembered

OURS = "Apache-2.0"
"""Licence of the captions and scenes that ship with ovref."""


def provenance(config: BuildConfig, folders: Folders) -> dict[str, Any]:
    """The corpus, the steps with all their settings, and the models of a build, as plain values.

    Licences are those of the `licences` settings that name a model or the corpus (`<name>:
    <licence>`), of `corpus.licence`, and of `ovref.licences`; all others are `unknown`.
    """
    stated = dict(text.split(": ", 1) for text in config.licences if ": " in text)
    name = corpus_id(config.corpus)
    path = config.corpus.path
    is_ours = path.startswith(MINIATURE) or shipped.is_shipped(path)
    steps = [folders.captions, folders.prompts, folders.selected, folders.images]
    models = [
        dataclasses.asdict(model) | {"licence": stated.get(model.model) or licence_of(model.model)}
        for model in _models(config)
    ]
    return {
        "corpus": {
            "corpus_id": name,
            "licence": ", ".join(licences_of_corpus(config.corpus))
            or stated.get(name)
            or (OURS if is_ours else UNKNOWN),
            "identity": folders.captions.identity["corpus"],
        },
        "models": models,
        "steps": {
            step.name: {"fingerprint": step.fingerprint, "identity": step.identity}
            for step in (*filter(None, steps), folders.references)
        },
    }


def licences(found: dict[str, Any]) -> list[str]:
    """The licences in a provenance, as the manifest lists them: `<name>: <licence>`."""
    corpus = found["corpus"]
    lines = [f"{corpus['corpus_id']}: {corpus['licence']}"]
    lines += [f"{model['model']}: {model['licence']}" for model in found["models"]]
    return list(dict.fromkeys(lines))


def unknown(found: dict[str, Any]) -> list[str]:
    """The names of the models and the corpus whose licence is not known."""
    suffix = f": {UNKNOWN}"
    return [line.removesuffix(suffix) for line in licences(found) if line.endswith(suffix)]


def _models(config: BuildConfig) -> list[CheckedModel]:
    """The models of a build's stages, with their recorded weights."""
    output = output_of(config)
    recorded = remembered(output.upstream)
    if output.upstream != output.store:
        recorded = [*recorded, *remembered(output.store)]
    known = {(entry.step, entry.setting, entry.model): entry for entry in recorded}
    found = []
    for spec in (config.extract_nouns, config.make_images, config.embed):
        for setting, model, revision in models_of(spec):
            unrecorded = CheckedModel(
                step=spec.name, setting=setting, model=model, revision=revision,
                weights=UNKNOWN_WEIGHTS,
            )  # fmt: skip
            found.append(known.get((spec.name, setting, model), unrecorded))
    return found
