"""The command `ovref`: few verbs, each with a configuration file and `key=value` overrides.

Exit codes: 0 done; 1 shards failed for good, something is not whole, or something unforeseen; 2 the
configuration, an input, a model or the store has to be mended first; 130 stopped by Ctrl-C or
SIGTERM.
"""

import argparse
import importlib.metadata
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

FAILED, MEND_FIRST, STOPPED = 1, 2, 130

EXAMPLES = """\
examples:
  ovref build --config configs/miniature.yaml output=runs/demo
  ovref build --config configs/fossil.yaml --dry-run corpus.path=captions.txt output=runs/first
  ovref build --config configs/fossil.yaml engine.engine=ray engine.workers=8 \\
      engine.gpus_per_worker=1 output=s3://bucket/first
  ovref reduce --config configs/miniature.yaml output=runs/demo replace=true \\
      reduce.prototypes.k=5
  ovref evaluate --config configs/miniature_evaluate.yaml collection=runs/demo/collection
  ovref inspect runs/demo --pictures samples.png
  ovref reference runs/demo/collection 17 --regenerate
  ovref status runs/demo
  ovref bench --config configs/fossil.yaml --batch-sizes 8,16 corpus.path=captions.txt output=x
  ovref submit --config configs/fossil.yaml --address http://HEAD:8265 engine.engine=ray \\
      engine.workers=8 engine.gpus_per_worker=1 output=s3://bucket/first

A build that was stopped or killed goes on where it was: run the same command again.
"""

OVERRIDE_HELP = "a setting over the file's, as a.b=value with the value in YAML"


def parser() -> argparse.ArgumentParser:
    """The command's arguments. Knobs are settings in the file, not flags."""
    top = argparse.ArgumentParser(
        prog="ovref",
        description="Builds reference collections for training-free open-vocabulary segmentation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("ovref")
    top.add_argument("--version", action="version", version=f"ovref {version}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    helps = {
        "build": "build a collection from captions, or carry on building it",
        "submit": "send a build to a Ray cluster as a job, and follow it",
        "retry-failed": "make again what failed for good in a build, once its cause is mended",
        "reduce": "make the collection again from a build's finished references",
        "bench": "measure how fast a build's models are here, and where the time goes",
        "evaluate": "measure a collection on scenes of the miniature, or on labelled images",
    }
    for verb, text in helps.items():
        sub = verbs.add_parser(verb, help=text, description=_sentence(text))
        sub.add_argument("--config", required=True, metavar="FILE", help="settings, in YAML")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDE_HELP)
        if verb in ("build", "retry-failed"):
            sub.add_argument(
                "--dry-run", action="store_true", help="only say what would be done; write nothing"
            )
        if verb == "build":
            sub.add_argument(
                "--probe", type=_number(int), default=16, metavar="N",
                help="captions that a dry run sends through the models, to estimate time and "
                "storage; 0 for none; default: 16",
            )  # fmt: skip
            sub.add_argument(
                "--price", type=_number(float), metavar="AMOUNT",
                help="of a GPU-hour (of a worker's, without GPUs), for the estimate's cost",
            )  # fmt: skip
        if verb == "bench":
            sub.add_argument(
                "--images", type=_number(int), default=32, metavar="N",
                help="captions that are measured with; default: 32",
            )
            sub.add_argument(
                "--batch-sizes", type=_numbers, default=[], metavar="N,N",
                help="of the stage that makes images, each tried; default: the configuration's",
            )  # fmt: skip
        if verb == "submit":
            _add_submit_options(sub)
    text = "show what is in a build's output, one of its steps or a collection"
    sub = verbs.add_parser("inspect", help=text, description=_sentence(text))
    sub.add_argument("place", help="folder or URL")
    sub.add_argument(
        "--pictures", metavar="PNG", help="draw some of a build's images, heatmaps and masks"
    )
    text = "show what is known of one reference"
    sub = verbs.add_parser("reference", help=text, description=_sentence(text))
    sub.add_argument("collection", help="folder or URL")
    sub.add_argument("id", type=int, help="of the reference")
    sub.add_argument(
        "--regenerate", action="store_true", help="make it again, and compare it with what is there"
    )
    sub.add_argument(
        "--build", metavar="URL",
        help="output of the build that made it; default: the folder that the collection is in",
    )  # fmt: skip
    text = "delete references from a collection: they are never returned again"
    sub = verbs.add_parser("tombstone", help=text, description=_sentence(text))
    sub.add_argument("collection", help="folder or URL")
    for name, text in {
        "key": "of a reference, or of an image for all of its references",
        "source": "of masks, such as daam",
        "noun": "as in the vocabulary",
    }.items():
        sub.add_argument(f"--{name}", action="append", default=[], metavar="TEXT", help=text)
    sub.add_argument("--reason", required=True, metavar="TEXT", help="for the record")
    text = "show where a build stands: shards, drops and failures of every step"
    sub = verbs.add_parser("status", help=text, description=_sentence(text))
    sub.add_argument("output", help="folder or URL")
    sub.add_argument("--json", action="store_true", help="for programs")
    text = "check that a build or a collection is whole; reads all of it"
    sub = verbs.add_parser("verify", help=text, description=_sentence(text))
    sub.add_argument("place", help="folder or URL")
    text = "delete what killed attempts have left in a build's output"
    sub = verbs.add_parser("gc", help=text, description=_sentence(text))
    sub.add_argument("output", help="folder or URL")
    sub.add_argument(
        "--older-than", type=_number(float), default=24.0, metavar="HOURS",
        help="must be more than a shard can take; default: 24",
    )  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    return top


def _add_submit_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--address", metavar="URL", help="of the cluster, such as http://HEAD:8265")
    sub.add_argument("--runtime-env", metavar="FILE", help="Ray runtime environment, in YAML")
    sub.add_argument("--again", action="store_true", help="also if the build has succeeded before")
    waiting = sub.add_mutually_exclusive_group()
    waiting.add_argument("--detach", action="store_true", help="do not wait for the job")
    waiting.add_argument("--attach", action="store_true", help="follow the job submitted before")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _number(kind: type) -> Callable[[str], Any]:
    """Reads an argument that is a number of this kind, 0 or more."""

    def read(text: str) -> Any:
        number = kind(text)
        if not 0 <= number < float("inf"):
            raise argparse.ArgumentTypeError(f"must be 0 or more, found {text}")
        return number

    read.__name__ = kind.__name__  # which argparse names where `text` is no number
    return read


def _numbers(text: str) -> list[int]:
    """Reads an argument of whole numbers, 1 or more, with commas between them."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {text}")
    return numbers


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parser().parse_args(arguments)
    _quieten()
    # Imported late, so that --help answers at once.
    from ovref.errors import OvrefError
    from ovref_pipelines.engine.ledger import JobError
    from ovref_pipelines.engine.stopping import StoppedError

    verb = {
        "build": _build, "retry-failed": _retry, "submit": _submit, "reduce": _reduce,
        "evaluate": _evaluate, "inspect": _inspect, "status": _status, "verify": _verify, "gc": _gc,
        "reference": _reference,
        "tombstone": _tombstone,
        "bench": _bench,
    }  # fmt: skip
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return verb[options.verb](options)
    except (KeyboardInterrupt, StoppedError) as error:
        said = str(error) or "stopped"
        _say(f"ovref: {said}; nothing committed is lost, run the same command to go on")
        return STOPPED
    except JobError as error:
        _say(f"ovref: {error}")
        return FAILED
    except OvrefError as error:
        _say(f"ovref: {error}")
        return MEND_FIRST
    except OSError as error:
        _say(f"ovref: {type(error).__name__}: {error}; if it passes, run the same command to go on")
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _build(options: argparse.Namespace) -> int:
    from ovref_pipelines import recipe
    from ovref_pipelines.verbs import show

    config = _config(recipe.BuildConfig, options)
    if options.dry_run:
        print(show.plan(recipe.open_steps(config, create=False)))
        if options.probe:
            from ovref_pipelines.verbs import estimate

            print(estimate.text(estimate.estimate(config, options.probe, options.price)))
        return 0
    summary = recipe.build(config, _teller(config))
    print(show.build_summary(summary))
    return FAILED if summary.quarantined else 0


def _retry(options: argparse.Namespace) -> int:
    from ovref_pipelines import output, recipe
    from ovref_pipelines.verbs import retry

    config = _config(recipe.BuildConfig, options)
    output.open_build(config.output)  # a wrong name would begin a build
    folders = recipe.open_steps(config, create=False)
    failed = retry.failed_in(config, folders)
    print(retry.failed_text(failed))
    if options.dry_run:
        return 0
    retry.take_back(config, folders, failed)
    return _build(options)


def _reduce(options: argparse.Namespace) -> int:
    from ovref_pipelines import recipe
    from ovref_pipelines.verbs import show

    config = _config(recipe.BuildConfig, options)
    references = recipe.open_steps(config, create=False).references
    result = recipe.reduce(config, references, _say)
    print(show.collection_summary(result, recipe.collection_store(config).url))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ovref.evaluation.evaluate import EvaluateSpec, evaluate

    spec = _config(EvaluateSpec, options)
    evaluate(spec)
    print(f"written to {spec.output}: {', '.join(sorted(os.listdir(spec.output)))}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from ovref_pipelines.recipe import BuildConfig
    from ovref_pipelines.verbs import bench

    config = _config(BuildConfig, options)
    print(bench.text(bench.bench(config, options.images, options.batch_sizes, _say)))
    return 0


def _reference(options: argparse.Namespace) -> int:
    from ovref_inference import ReferenceCollection
    from ovref_pipelines.verbs import regenerate

    with ReferenceCollection.open(options.collection) as collection:
        if not options.regenerate:
            print(regenerate.reference_text(regenerate.row_of(collection, options.id)))
            return 0
        build = options.build or options.collection.rstrip("/").rpartition("/")[0] or "."
        found = regenerate.regenerate(collection, options.id, build)
    print(regenerate.reference_text(found.row))
    print(regenerate.text(found))
    return 0 if found.same else FAILED


def _tombstone(options: argparse.Namespace) -> int:
    from ovref.errors import InputError
    from ovref_inference import ReferenceCollection
    from ovref_inference.collection import store

    named = {"keys": options.key, "sources": options.source, "nouns": options.noun}
    if not any(named.values()):
        raise InputError("say what is to be deleted, by --key, --source or --noun")
    with ReferenceCollection.open(options.collection) as collection:
        ids = collection.ids_of(**named).tolist()
    if not ids:
        asked = "; ".join(f"{what}: {', '.join(names)}" for what, names in named.items() if names)
        raise InputError(f"{options.collection} has no reference of the {asked}")
    store.tombstone(options.collection, ids, options.reason)
    print(
        f"{len(ids)} references deleted; reducing again with base={options.collection} makes the "
        "prototypes without them, until then whoever opens the collection does"
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ovref_pipelines.verbs import show

    print(show.place(options.place))
    if options.pictures:
        show.draw_samples(options.place, options.pictures)
        print(f"pictures: {options.pictures}")
    return 0


def _submit(options: argparse.Namespace) -> int:
    from ovref_pipelines import recipe
    from ovref_pipelines.verbs import submit

    config = _config(recipe.BuildConfig, options)
    environment = submit.read_runtime_env(options.runtime_env)
    client = submit.connect(options.address)
    if options.attach:
        job = submit.latest(client, config)
    else:
        job = submit.submit(client, config, environment, again=options.again, say=_say)
        _say(f"ovref: submitted as job {job}")
    if options.detach:
        return 0
    try:
        code, details = submit.follow(client, job, _write)
    except KeyboardInterrupt:
        _say(f"ovref: job {job} goes on; --attach follows it, `ray job stop {job}` ends it")
        return STOPPED
    reason = f": {details.message}" if code and details.message else ""
    _say(f"ovref: job {job} {details.status.value.lower()}{reason}")
    return code


def _status(options: argparse.Namespace) -> int:
    from ovref_pipelines import output
    from ovref_pipelines.verbs import maintain

    build = output.open_build(options.output)
    show = maintain.status_json if options.json else maintain.status_text
    print(show(maintain.status(build), build))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ovref_pipelines.verbs.verify import verify

    problems = verify(options.place)
    print("\n".join(problems) if problems else f"{options.place} is whole")
    return FAILED if problems else 0


def _gc(options: argparse.Namespace) -> int:
    from ovref_pipelines import output
    from ovref_pipelines.verbs import maintain

    build = output.open_build(options.output)
    garbage = maintain.collect_garbage(build, options.older_than * 3600, dry_run=options.dry_run)
    print(maintain.garbage_text(garbage, options.dry_run))
    return 0


def _config(cls: type, options: argparse.Namespace) -> Any:
    from ovref.config import load

    return load(cls, options.config, options.overrides)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _teller(config: Any) -> Any:
    """What tells people, or programs, where a build stands."""
    if config.engine.log == "text":
        return _say
    from ovref_pipelines.engine.progress import json_line

    return lambda message: _say(json_line(message.partition(":")[0], "build", message, {}))


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _stop(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _quieten() -> None:
    """Other libraries' notices are not for the people who run a build."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its notices itself
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in Ray's workers; see engine
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars that rewrite themselves spoil a log


if __name__ == "__main__":
    raise SystemExit(main())
