"""Checks of corpus, base and models before the first shard of a build, and in a dry run."""

import dataclasses
import gc
import json
from collections.abc import Sequence
from functools import partial

from ovref.check_models import CheckedModel, changed_models, check_models
from ovref.contract import Dropped, Spec
from ovref.corpora import CorpusSpec
from ovref.devices import cuda
from ovref.errors import MismatchError
from ovref.ingest import first_of_each_key, no_usable_caption
from ovref.labelled_corpora import read_corpus
from ovref.reduce import ReduceSpec, collection
from ovref.reduce.made_from import made_by
from ovref.stages.embed import Embed
from ovref.storage.file_store import Store
from ovref_pipelines.engine.config import EngineConfig, PoolConfig
from ovref_pipelines.engine.run_steps import limit_threads, ray_module

MODELS = "models.json"
"""File in an output: the models of its steps and hashes of their weights."""


def check_corpus(corpus: CorpusSpec, *, images: bool) -> None:
    """Reads a corpus up to its first usable caption.

    Raises:
        InputError: it cannot be read, or has none.
    """
    dropped: dict[str, int] = {}
    for item in first_of_each_key(read_corpus(corpus, images=images)):
        if not isinstance(item, Dropped):
            return
        dropped[item.reason] = dropped.get(item.reason, 0) + 1
    raise no_usable_caption(dropped)


def check_base(base: str | None, spec: ReduceSpec, embed: Embed) -> None:
    """Checks before anything is generated that a collection can be grown; see
    `ovref.reduce.collection.check_base`."""
    if base is not None:
        collection.check_base(Store.open(base), spec, made_by(embed, (), None))


def check(specs: Sequence[tuple[Spec, PoolConfig]], engine: EngineConfig) -> list[CheckedModel]:
    """Builds every stage on a worker like those of the build, and feeds it one blank input.

    Raises:
        ModelError: a model cannot be loaded or used.
    """
    calls = [(partial(_check_here, spec, engine.threads), pool) for spec, pool in specs]
    if engine.engine == "ray":
        found = ray_module(engine, "tasks").run_each(calls, engine)
    else:
        found = [call() for call, _ in calls]
    return [model for models in found for model in models]


def _check_here(spec: Spec, threads: int) -> tuple[CheckedModel, ...]:
    limit_threads(threads)
    found = check_models([spec])
    gc.collect()
    if (gpu := cuda()) is not None:
        gpu.empty_cache()
    return found


def remembered(store: Store) -> list[CheckedModel]:
    """The recorded models with which the steps of an output were started."""
    content = store.read_if_there(MODELS)
    return [] if content is None else [CheckedModel(**entry) for entry in json.loads(content)]


def remember(store: Store, found: Sequence[CheckedModel]) -> None:
    """Records the models of an output's unfinished steps.

    Raises:
        MismatchError: a step was started with other weights under the same name.
    """
    before = remembered(store)
    if changed := changed_models(before, found):
        raise MismatchError(
            f"{'; '.join(changed)}. Restore the old weights, specify a revision, or choose another "
            "output"
        )
    names = {(model.step, model.setting) for model in found}
    kept = [model for model in before if (model.step, model.setting) not in names]
    entries = [dataclasses.asdict(model) for model in [*kept, *found]]
    store.write(MODELS, (json.dumps(entries, indent=1) + "\n").encode())
