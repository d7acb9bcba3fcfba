"""The verbs of the command `ovref`: each takes its arguments and returns an exit code."""

import dataclasses
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ovref.config import load, load_tree, read_tree
from ovref.errors import InputError
from ovref.locations import absolute, absolute_local
from ovref.storage.file_store import Store
from ovref_inference import ReferenceCollection
from ovref_inference.collection.format import MANIFEST
from ovref_pipelines import preflight, recipe, shipped
from ovref_pipelines.build_config import BuildConfig, output_of, with_absolute_places
from ovref_pipelines.console import Console
from ovref_pipelines.errors import FAILED, MEND_FIRST, STOPPED
from ovref_pipelines.folders import open_steps, unfinished
from ovref_pipelines.output import open_build
from ovref_pipelines.verbs import show

Config = TypeVar("Config")
PROBE = 16
"""Default of `--probe`: captions that a dry run sends through the models."""


def _config(cls: type[Config], options: Namespace) -> Config:
    config = None if options.config is None else shipped.find(options.config)
    return load(cls, config, options.overrides)


def settings_text(options: Namespace) -> str:
    """Every setting of a verb that takes a configuration (`--print-config`)."""
    from ovref.print_config import print_config
    from ovref_pipelines.verbs import evaluate, train

    kinds = {"evaluate": evaluate.EvaluateConfig, "train": train.TrainConfig}
    config = None if options.config is None else shipped.find(options.config)
    kind = kinds.get(options.verb, BuildConfig)
    return print_config(kind, config, options.overrides).rstrip("\n")


def _build_config(options: Namespace, console: Console) -> BuildConfig:
    if "engine.log=json" in options.overrides:
        console.use_json()  # errors in the configuration are JSON too
    if getattr(options, "price", None) is not None:
        options.overrides.append(f"engine.price_per_hour={options.price}")
    config = with_absolute_places(_config(BuildConfig, options))
    if config.engine.log == "json" and not console.json:
        console.use_json()
    return config


def _build(options: Namespace, console: Console) -> int:
    config = _build_config(options, console)
    if options.retry_failed:
        from ovref_pipelines.verbs import retry

        open_build(config.output)  # a wrong name would start a new build
        folders = open_steps(config)
        failed = retry.failed_in(config, folders)
        console.show(retry.failed_text(failed))
        if not options.dry_run:
            retry.take_back(config, folders, failed)
    if options.dry_run:
        return _dry_run(config, options, console)
    summary = recipe.build(config, console.say)
    console.show(show.build_summary(summary))
    return FAILED if summary.quarantined else 0


def _grow(options: Namespace, console: Console) -> int:
    import tempfile

    from ovref_pipelines.verbs import coverage, grow

    plan = grow.plan(
        grow.Grow(
            place=options.place, classes=options.classes, target=options.target,
            output=options.output, templates=options.templates, captions=tuple(options.captions),
            config=options.config, overrides=tuple(options.overrides),
        )
    )  # fmt: skip
    console.show(grow.plan_text(plan))
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            return _dry_run(grow.with_corpus_in(plan, folder), options, console)
    if not plan.captions:
        return 0
    summary, after = grow.grow_collection(plan, console.say)
    console.show(show.build_summary(summary))
    if after:
        console.show(coverage.change_text(plan.before, after, options.target))
    return FAILED if summary.quarantined else 0


def _dry_run(config: BuildConfig, options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import estimate

    folders = open_steps(config)
    preflight.check_base(config.base, config.reduce, config.embed)
    console.show(show.plan(folders))
    if folders.captions.complete() is None:
        preflight.check_corpus(config.corpus, images=config.uses_images)
    here = dataclasses.replace(config.engine, engine="local", placement="steps", workers=1)
    stages = unfinished(config, folders)
    preflight.check([(spec, pool) for spec, pool, _ in stages], here)
    probe = PROBE if options.probe is None else options.probe
    if probe:
        console.show(estimate.text(estimate.estimate(config, probe, config.engine.price_per_hour)))
    return 0


def _reduce(options: Namespace, console: Console) -> int:
    config = _build_config(options, console)
    result = recipe.reduce(config, open_steps(config), console.say)
    console.show(show.collection_summary(result, output_of(config).collection.url))
    return 0


def _evaluate(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import evaluate

    config = evaluate.with_absolute_places(_config(evaluate.EvaluateConfig, options))
    if config.engine.log == "json":
        console.use_json()
    evaluate.evaluate(config, console)
    console.show(f"written to {config.output}: {', '.join(sorted(os.listdir(config.output)))}")
    return 0


def _train(options: Namespace, console: Console) -> int:
    from ovref.training.methods import module_of
    from ovref_pipelines.verbs import train

    path = None if options.config is None else shipped.find(options.config)
    config = train.with_absolute_places(train.read(path, options.overrides))
    if options.dry_run:
        console.show(module_of(config.spec).check(config.spec))
        return 0
    train.train(config, console)
    return 0


def _reproduce(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import paper_rows, reproduce

    if options.name == "list":
        console.show("\n".join(paper_rows.names()))
        return 0
    if options.data is None:
        raise InputError("give --data, the folder of data sets")
    data, runs = (absolute_local(getattr(options, one), f"--{one}") for one in ("data", "runs"))
    path = paper_rows.find(options.name)
    own = path.parent != paper_rows.folder()
    shipped = None if own else paper_rows.read_row(path, data=data, runs=runs)
    row = paper_rows.read_row(path, data=data, runs=runs, overrides=options.overrides)
    console.show(reproduce.introduction(row))
    checked = reproduce.check(row, shipped)
    console.show(reproduce.text(checked))
    if options.dry_run:
        return MEND_FIRST if checked.problems else 0
    console.show(reproduce.reproduce(row, checked, console, partial=options.partial))
    return 0


def _compare(options: Namespace, console: Console) -> int:
    from ovref.evaluation import compare

    folders = [absolute_local(place, "run") for place in (options.first, options.second)]
    rows = [options.row, options.second_row or options.row]
    runs = [compare.open_run(*each) for each in zip(folders, rows, strict=True)]
    output = absolute_local(options.output, "--output")
    result = compare.compare(runs[0], runs[1], Path(output), options.pictures)
    console.show(compare.text(result))
    console.show(f"written to {output}: {', '.join(sorted(os.listdir(output)))}")
    return 0


def _bench(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import bench

    config = _build_config(options, console)
    console.show(bench.text(bench.bench(config, options.images, options.batch_sizes, console.say)))
    return 0


def _check(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import check

    found = shipped.find(options.config)
    tree = read_tree(found)
    # No caption is read, and several configurations leave the corpus to the user.
    tree.setdefault("corpus", {}).setdefault("path", "captions.txt")
    config = with_absolute_places(load_tree(BuildConfig, tree, str(found), options.overrides))
    checked = check.check(config, shapes=options.shapes, random=options.random, say=console.say)
    console.show(checked.text)
    return MEND_FIRST if checked.problems else 0


def _status(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import status

    place = absolute(options.place)
    console.show((status.place_json if options.json else status.place_text)(place))
    if options.pictures:
        pictures = absolute_local(options.pictures, "--pictures")
        show.draw_samples(place, pictures)
        console.show(f"pictures: {pictures}")
    return 0


def _reference(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import regenerate

    place = absolute(options.collection, "collection")
    with ReferenceCollection.open(place) as collection:
        if not options.regenerate:
            row = regenerate.row_of(collection, options.id)
            console.show(regenerate.reference_text(row))
            return 0
        build = absolute(options.build or place.rpartition("/")[0] or "/", "--build")
        found = regenerate.regenerate(collection, options.id, build)
    console.show(regenerate.reference_text(found.row))
    console.show(regenerate.text(found))
    return 0 if found.same else FAILED


def _tombstone(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import tombstone

    place = absolute(options.collection, "collection")
    if options.list:
        console.show((tombstone.listed_json if options.json else tombstone.listed)(place))
        return 0
    if not (options.undo or options.dry_run or (options.reason or "").strip()):
        raise InputError("give --reason: it is stored in the collection with the deletions")
    ids = tombstone.wanted(
        place,
        ids=None if options.ids is None else tombstone.read_ids(options.ids),
        keys=options.key, sources=options.source, nouns=options.noun, deleted=options.undo,
    )  # fmt: skip
    if options.undo:
        console.show(tombstone.undo(place, ids, dry_run=options.dry_run))
    else:
        console.show(tombstone.delete(place, ids, options.reason or "", dry_run=options.dry_run))
    return 0


def _explore(options: Namespace, console: Console) -> int:
    from ovref_pipelines.explore import serve

    place = absolute(options.place)
    build = None if options.build is None else absolute(options.build, "--build")
    serve.serve(
        place, build, host=options.host, port=options.port, say=console.say,
        browser=not options.no_browser,
    )  # fmt: skip
    return 0


def _submit(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import submit

    environment = submit.read_runtime_env(options.runtime_env)
    if options.attach:
        client, job = submit.connect(options.address), options.attach
        submit.check_known(client, job)
    else:
        config = _config(BuildConfig, options)
        client = submit.connect(options.address)
        if options.attach is None:
            job = submit.submit(
                client, config, environment, again=options.again, say=console.say
            )
            console.say(f"ovref: submitted as job {job}")
        else:
            job = submit.latest(client, config)
    if options.detach:
        return 0
    try:
        code, details = submit.follow(client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        console.say(
            f"ovref: job {job} keeps running; --attach {job} follows it, "
            f"`ovref cancel {job}` ends it"
        )
        return STOPPED
    reason = f": {details.message}" if code and details.message else ""
    console.say(f"ovref: job {job} {details.status.value.lower()}{reason}")
    return code


def _jobs(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import jobs, submit

    found = jobs.jobs(submit.connect(options.address), every=options.all)
    text = jobs.jobs_json(found) if options.json else jobs.jobs_text(found, every=options.all)
    console.show(text)
    return 0


def _cancel(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import jobs, submit

    client = submit.connect(options.address)
    job = jobs.cancel(client, options.job, wait=not options.detach, say=console.say)
    console.show(f"job {job.name} {'was asked to stop' if options.detach else job.status}")
    return 0


def _verify(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs.verify import verify

    problems = verify(absolute(options.place))
    console.show("\n".join(problems) if problems else f"{options.place} is whole")
    return FAILED if problems else 0


def _gc(options: Namespace, console: Console) -> int:
    from ovref_pipelines.verbs import garbage

    place, older_than_s = absolute(options.output, "output"), options.older_than * 3600
    if (store := Store.open(place)).exists(MANIFEST):
        found = garbage.unpublished(store, older_than_s, dry_run=options.dry_run)
    else:
        build = open_build(place)
        found = garbage.collect_garbage(build, older_than_s, dry_run=options.dry_run)
    console.show(garbage.garbage_text(found, options.dry_run))
    return 0


VERBS: dict[str, Callable[[Namespace, Console], Any]] = {
    "build": _build,
    "retry-failed": _build,
    "submit": _submit,
    "jobs": _jobs,
    "cancel": _cancel,
    "reduce": _reduce,
    "grow": _grow,
    "bench": _bench,
    "check": _check,
    "evaluate": _evaluate,
    "train": _train,
    "compare": _compare,
    "reproduce": _reproduce,
    "status": _status,
    "inspect": _status,
    "reference": _reference,
    "tombstone": _tombstone,
    "explore": _explore,
    "verify": _verify,
    "gc": _gc,
}
