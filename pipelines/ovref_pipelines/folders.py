"""The step folders of a build: opened, compared with the configuration, then created."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ovref.contract import Spec
from ovref.errors import MismatchError
from ovref.identity import canonical, spec_identity
from ovref.labelled_corpora import identify_corpus
from ovref.storage.file_store import Store
from ovref.storage.steps import STEP, StepFolder, existing_step, open_step
from ovref_pipelines.build_config import BuildConfig, output_of
from ovref_pipelines.engine.config import PoolConfig


@dataclass(frozen=True, kw_only=True)
class Folders:
    """The steps of a build, opened."""

    captions: StepFolder
    prompts: StepFolder
    selected: StepFolder | None
    """None if the build has no such step."""
    images: StepFolder
    references: StepFolder


def open_steps(config: BuildConfig) -> Folders:
    """Opens the folders of all steps, existing or not, without writing.

    Raises:
        InputError: the corpus does not exist.
        MismatchError: a folder was made with other settings.
    """
    output = output_of(config)
    here, upstream = output.store, output.upstream
    corpus = {"corpus": identify_corpus(config.corpus), "shard_size": config.shard_size}
    if config.uses_images:
        corpus["with_images"] = True
    captions = open_step(upstream, "captions", corpus, create=False)

    def opened(store: Store, name: str, spec: Any, source: StepFolder) -> StepFolder:
        identity, parents = {"stages": [spec_identity(spec)]}, (source.fingerprint,)
        try:
            return open_step(store, name, identity, parents, create=False)
        except MismatchError as error:
            older = _by_an_older_version(existing_step(store, name), identity, parents)
            if older is None:
                raise
            if config.accept_older:
                return older
            raise MismatchError(
                f"{error}. An earlier version of ovref made it with the same settings: "
                "accept_older=true uses it as it is, another output makes it again"
            ) from error

    prompts = opened(upstream, "prompts", config.extract_nouns, captions)
    selected = None
    if config.select_prompts is not None:
        selected = opened(upstream, "selected", config.select_prompts, prompts)
    images = opened(upstream, "images", config.make_images, selected or prompts)
    try:
        references = opened(here, "references", config.embed, images)
    except MismatchError as error:
        raise MismatchError(
            f"{error}. Another output with images_from={upstream.url} embeds the same images"
        ) from error
    return Folders(
        captions=captions, prompts=prompts, selected=selected, images=images, references=references
    )


def _by_an_older_version(
    found: StepFolder, identity: dict[str, Any], parents: tuple[str, ...]
) -> StepFolder | None:
    """The existing step if only versions of stages differ; otherwise None."""
    same = found.parents == parents and same_but_for_versions(found.identity, identity)
    return found if same else None


def same_but_for_versions(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two steps, given by their identities, have equal stages but for their versions."""

    def unversioned(tree: dict[str, Any]) -> Any:
        return canonical([stage | {"version": 0} for stage in tree.get("stages", [])])

    return bool(unversioned(left) == unversioned(right))


def create_steps(config: BuildConfig, folders: Folders) -> None:
    """Creates the folders of steps that were opened without creating them."""
    output = output_of(config)
    steps = (folders.captions, folders.prompts, folders.selected, folders.images)
    for step in (*filter(None, steps), folders.references):
        place = output.place(step.name)
        if not place.exists(f"{step.name}/{STEP}") or not step.committed():
            open_step(place, step.name, step.identity, step.parents)


def unfinished(config: BuildConfig, folders: Folders) -> list[tuple[Spec, PoolConfig, StepFolder]]:
    """The stages with missing shards, with their workers and steps."""
    engine = config.engine
    embedders = engine.embedders if engine.placement == "pools" else engine.pool
    stages = [
        (config.extract_nouns, dataclasses.replace(engine.pool, gpus_per_worker=0.0), "prompts"),
        (config.make_images, engine.pool, "images"),
        (config.embed, embedders, "references"),
    ]
    found = [(spec, pool, getattr(folders, name)) for spec, pool, name in stages]
    return [stage for stage in found if stage[2].complete() is None]
