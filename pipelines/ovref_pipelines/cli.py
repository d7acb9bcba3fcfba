"""The command `ovref`: few verbs, each with a configuration and `key=value` overrides."""

import argparse
import importlib.metadata
import signal
import sys
from typing import Any

from ovref_pipelines import console as consoles
from ovref_pipelines.errors import FAILED, MEND_FIRST, READER_GONE, STOPPED
from ovref_pipelines.tool_arguments import add_grow, add_tools, number

LIGHT_VERBS = ("status", "inspect", "verify", "gc", "reference", "tombstone")
"""Verbs for which the extra `cli` is enough, without `--pictures` and `--regenerate`."""
LIGHT_PACKAGES = ("pydantic", "yaml", "PIL", "rich", "pycocotools")
"""Top-level modules of the packages in the extra `cli`."""
RESUMED = (
    "build", "retry-failed", "submit", "reduce", "evaluate", "train", "reproduce", "grow",
    "convert collection",
)  # fmt: skip
"""Verbs, or kinds of a verb, that resume where they were stopped; the others start again."""
EXTRAS = {
    **dict.fromkeys(
        ("segment", "search", "coverage", "publish", "export"), "cli,segment,formats,hf"
    ),
    "explore": "explore",
}
"""Extras for verbs that do not build."""

EPILOG = """\
examples:
  ovref build --config miniature output=runs/demo
  ovref build --config own_captions corpus.path=captions.txt output=runs/first --dry-run
  ovref build --config own_captions corpus.path=captions.txt output=s3://bucket/first \\
      engine.workers=8
  ovref reduce --config miniature output=runs/demo replace=true reduce.prototypes.k=3
  ovref evaluate --config miniature_evaluate collection=runs/demo/collection
  ovref compare runs/first runs/second --output runs/compared
  ovref train --config miniature_clip_rc
  ovref reproduce fossil_ade --data /data --dry-run
  ovref search runs/demo/collection red boat --sheet boats.png
  ovref segment runs/demo/collection photographs --classes tree,grass,sky --output runs/segments
  ovref coverage runs/demo/collection --classes classes.txt
  ovref grow runs/demo --classes classes.txt --target 30 --output runs/grown
  ovref publish runs/demo/collection hf://user/name
  ovref convert collection runs/demo/collection runs/divided --partition-references 1000000
  ovref status runs/demo --pictures samples.png
  ovref reference runs/demo/collection 17 --regenerate
  ovref explore runs/demo
  ovref check --config fossil --random
  ovref bench --config own_captions --batch-sizes 8,16 corpus.path=captions.txt output=runs/first
  ovref submit --config own_captions --address http://HEAD:8265 engine.workers=8 \\
      corpus.path=s3://bucket/captions.txt output=s3://bucket/first

A build that was stopped or killed resumes where it stopped: run the same command again.

exit codes:
  0    done
  1    shards failed permanently, something is damaged, or an unforeseen error
  2    the arguments, the configuration, an input, a model or the store must be fixed first
  130  stopped by Ctrl-C or SIGTERM; nothing committed is lost
  141  the reader of the output closed it
"""

OVERRIDE_HELP = (
    "key=value changes a setting: a.b=value, with numbers, lists and mappings in YAML. Settings "
    "and options may stand in any order."
)


def parser() -> argparse.ArgumentParser:
    """The command's arguments. What a build does is decided by settings, not by flags."""
    top = argparse.ArgumentParser(
        prog="ovref",
        description="Builds reference collections for training-free open-vocabulary segmentation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("ovref")
    top.add_argument("--version", action="version", version=f"ovref {version}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(verb: str, text: str, **options: Any) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}."
        return verbs.add_parser(verb, help=text, description=description, **options)

    def add_configured(verb: str, text: str) -> argparse.ArgumentParser:
        usage = f"ovref {verb} --config NAME [options] [key=value ...]"
        if verb == "evaluate":  # whose settings all have defaults but the collection and the output
            usage = usage.replace("--config NAME", "[--config NAME]")
        sub = add(verb, text, usage=usage, epilog=OVERRIDE_HELP)
        sub.add_argument(
            "--config", required=verb not in ("submit", "evaluate"), metavar="NAME",
            help="settings in YAML: a file, or the name of a configuration that comes with ovref",
        )  # fmt: skip
        sub.add_argument(
            "--print-config", action="store_true",
            help="only print every setting with its value and its meaning, as YAML",
        )  # fmt: skip
        sub.set_defaults(overrides=[])
        return sub

    build = add_configured("build", "build a collection from captions, or resume building it")
    _add_dry_run(build)
    build.add_argument(
        "--retry-failed", action="store_true",
        help="first withdraw shards whose records were excluded for killing their worker",
    )  # fmt: skip
    retry = verbs.add_parser("retry-failed", description="The same as build --retry-failed.")
    retry.add_argument("--config", required=True, metavar="NAME")
    _add_dry_run(retry)
    retry.set_defaults(overrides=[], retry_failed=True)
    _add_submit_options(add_configured("submit", "submit a build to a Ray cluster as a job"))
    jobs = add("jobs", "list the builds that run on a Ray cluster")
    jobs.add_argument("--all", action="store_true", help="include jobs that have ended")
    jobs.add_argument("--json", action="store_true", help="for programs")
    cancel = add("cancel", "stop a build on a Ray cluster; it finishes its shards in progress")
    cancel.add_argument("job", help="name of the job, or the output of its build")
    cancel.add_argument("--detach", action="store_true", help="do not wait until it has stopped")
    for sub in (jobs, cancel):
        _add_address(sub)
    add_configured("reduce", "rebuild the collection from a build's finished references")
    bench = add_configured("bench", "measure how fast a build's models are on this machine")
    bench.add_argument(
        "--images", type=number(int), default=32, metavar="N",
        help="captions to measure with; default: 32",
    )  # fmt: skip
    bench.add_argument(
        "--batch-sizes", type=_numbers, default=[], metavar="N,N",
        help="batch sizes of the image stage; default: the configuration's",
    )  # fmt: skip
    check = add_configured("check", "load the models of a configuration and say what they are")
    weights = check.add_mutually_exclusive_group()
    weights.add_argument(
        "--shapes", action="store_true", help="read their configurations alone, load no weights"
    )
    weights.add_argument(
        "--random", action="store_true",
        help="give known encoders random weights of the same size: nothing is downloaded",
    )  # fmt: skip
    add_configured("evaluate", "measure a collection on the miniature's scenes or labelled images")
    train = add_configured("train", "train a segmenter on labelled images, or resume training it")
    train.add_argument(
        "--dry-run", action="store_true", help="check data and models, make one step; write nothing"
    )

    reproduce = add(
        "reproduce", "reproduce a row of a paper's table: check, build, evaluate, compare",
        usage="ovref reproduce NAME --data DIR [options] [build.a=value evaluate.b=value ...]",
    )  # fmt: skip
    reproduce.add_argument(
        "name", metavar="NAME", help="a row shipped with ovref, or a file; `list` shows all"
    )
    reproduce.add_argument("--data", metavar="DIR", help="folder of data sets and weights")
    reproduce.add_argument(
        "--runs", default="runs/papers", metavar="DIR", help="results; default: runs/papers"
    )
    reproduce.add_argument(
        "--dry-run", action="store_true", help="check data and weights, build nothing"
    )
    reproduce.add_argument(
        "--partial", action="store_true", help="accept data and weights that are not as published"
    )
    reproduce.set_defaults(overrides=[])

    compare = add("compare", "compare two evaluations of the same images, class by class")
    compare.add_argument("first", metavar="RUN", help="output of an evaluation")
    compare.add_argument("second", metavar="RUN", help="output of another, or of the same")
    compare.add_argument("--output", required=True, metavar="FOLDER", help="created if missing")
    compare.add_argument(
        "--row", default="", metavar="NAME",
        help="name of the table row to compare; default: the first",
    )  # fmt: skip
    compare.add_argument(
        "--second-row", default="", metavar="NAME", help="row of the second run; default: as --row"
    )
    compare.add_argument(
        "--pictures", type=number(int), default=6, metavar="N",
        help="images drawn per side; 0 draws none; default: 6",
    )  # fmt: skip

    text = "describe a place: a build and its progress, a step, or a collection"
    status = add("status", text, aliases=["inspect"])
    status.add_argument("place", help="folder or URL")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument(
        "--pictures", metavar="PNG", help="draw some of a build's images, heatmaps and masks"
    )
    reference = add("reference", "show everything known about one reference")
    reference.add_argument("collection", help="folder or URL")
    reference.add_argument("id", type=int, help="number of the reference")
    reference.add_argument(
        "--regenerate", action="store_true", help="generate it again and compare the two"
    )
    reference.add_argument(
        "--build", metavar="URL",
        help="output of the build that made it; default: the folder that the collection is in",
    )  # fmt: skip
    tombstone = add("tombstone", "delete references from a collection")
    tombstone.add_argument("collection", help="folder or URL")
    for name, text in {
        "key": "key of a reference, or of an image for all of its references",
        "source": "source of masks, such as daam",
        "noun": "noun of the vocabulary",
    }.items():
        tombstone.add_argument(f"--{name}", action="append", default=[], metavar="TEXT", help=text)
    tombstone.add_argument(
        "--ids", metavar="FILE", help="numbers of references, separated by white space or commas"
    )
    tombstone.add_argument(
        "--reason", metavar="TEXT",
        help="needed to delete: one line, which is kept in the collection",
    )  # fmt: skip
    instead = tombstone.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="list deleted references with reasons")
    instead.add_argument("--undo", action="store_true", help="undo deletions")
    tombstone.add_argument("--dry-run", action="store_true", help="only print what would be done")
    tombstone.add_argument("--json", action="store_true", help="with --list, for programs")
    explore = add("explore", "explore a build or a collection in the browser")
    explore.add_argument("place", help="folder or URL")
    explore.add_argument(
        "--build", metavar="URL",
        help="output of the build that made a collection, for its images; default: the folder "
        "that the collection is in",
    )  # fmt: skip
    explore.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on; default: this machine only",
    )  # fmt: skip
    explore.add_argument(
        "--port", type=number(int), default=0, help="port to listen on; default: any free one"
    )
    explore.add_argument(
        "--no-browser", action="store_true", help="only print the address, with its secret token"
    )
    add_tools(add)
    _add_dry_run(add_grow(add))
    verify = add("verify", "check every file of a build or a collection")
    verify.add_argument("place", help="folder or URL")
    garbage = add("gc", "delete leftovers of killed attempts in a build's output or a collection")
    garbage.add_argument("output", help="folder or URL")
    garbage.add_argument(
        "--older-than", type=number(float), default=24.0, metavar="HOURS",
        help="must exceed the time that a shard can take; default: 24",
    )  # fmt: skip
    garbage.add_argument("--dry-run", action="store_true", help="only list what would be deleted")
    return top


def _add_dry_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--dry-run", action="store_true",
        help="check corpus, models and output, estimate time and storage; write nothing",
    )  # fmt: skip
    sub.add_argument(
        "--probe", type=number(int), metavar="N",
        help="captions to send through the models for the estimate of a dry run; 0 for none; "
        "default: 16",
    )  # fmt: skip
    sub.add_argument(
        "--price", type=number(float), metavar="AMOUNT",
        help="price per GPU-hour (per worker-hour without GPUs), to estimate the cost too",
    )  # fmt: skip


def _add_submit_options(sub: argparse.ArgumentParser) -> None:
    _add_address(sub)
    sub.add_argument("--runtime-env", metavar="FILE", help="Ray runtime environment, in YAML")
    sub.add_argument("--again", action="store_true", help="even if the build has succeeded before")
    waiting = sub.add_mutually_exclusive_group()
    waiting.add_argument("--detach", action="store_true", help="do not wait for the job")
    waiting.add_argument(
        "--attach", nargs="?", const="", metavar="JOB",
        help="follow a job submitted earlier: the one named, or the last one of this configuration",
    )  # fmt: skip


def _add_address(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--address", metavar="URL", help="the cluster's dashboard, such as http://HEAD:8265"
    )


def _numbers(text: str) -> list[int]:
    """Parses comma-separated whole numbers, each at least 1."""
    return list(map(number(int, 1), text.split(",")))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments; settings may stand anywhere among the options."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(options, "overrides"):
        options.overrides = rest
    if getattr(options, "probe", None) is not None and not options.dry_run:
        top.error("--probe needs --dry-run: add it, or omit --probe")
    if options.verb == "submit":
        if options.attach and "=" in options.attach:  # a setting after a bare --attach
            options.overrides.insert(0, options.attach)
            options.attach = ""
        if options.config is None and not options.attach:
            top.error("submit needs --config, or --attach with the name of a job")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    signals: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    console, verb, kind = consoles.Console(), "", ""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        consoles.prepare()
        options = parse(arguments)
        verb, kind = options.verb, getattr(options, "kind", "")
        return _run(options, console)
    except SystemExit:  # how argparse ends
        raise
    except BaseException as error:
        # Libraries convert an interrupted import into their own errors.
        code = STOPPED if signals else _code(error, verb, console)
        if code is None:
            if not console.json:
                raise
            console.unforeseen(error)
            return FAILED
        if code == STOPPED:
            reason = str(error) if type(error).__name__ == "StoppedError" else "stopped"
            again = "run the same command to start again"
            if verb in RESUMED or f"{verb} {kind}" in RESUMED or not verb:
                again = "nothing committed is lost, run the same command to resume"
            console.say(f"ovref: {reason}; {again}")
        return code
    finally:
        console.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(options: argparse.Namespace, console: consoles.Console) -> int:
    # Imported late, so that --help answers at once.
    from ovref_pipelines.tool_commands import TOOLS

    if options.verb in TOOLS:
        code = TOOLS[options.verb](options, console)
    else:
        from ovref_pipelines import commands

        if getattr(options, "print_config", False):
            console.show(commands.settings_text(options))
            return 0
        code = commands.VERBS[options.verb](options, console)
    sys.stdout.flush()
    return code


def _code(error: BaseException, verb: str, console: consoles.Console) -> int | None:
    """Reports an error and returns its exit code; None for an unexpected error."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "ovref").startswith("ovref"):
        light = verb in LIGHT_VERBS and error.name in LIGHT_PACKAGES
        extra = "cli" if light else EXTRAS.get(verb, "build")
        console.say(
            f"ovref: {verb} needs the package {error.name}, which is not installed: "
            f"`pip install 'ovref[cpu,{extra}]'`, in a clone `pip install '.[cpu,{extra}]'`",
            "error",
        )
        return MEND_FIRST
    from ovref_inference.errors import OvrefError
    from ovref_pipelines.errors import JobError, StoppedError

    if isinstance(error, KeyboardInterrupt | StoppedError):
        return STOPPED
    if isinstance(error, OSError) and consoles.is_reader_gone():
        return READER_GONE
    if isinstance(error, JobError):
        console.say(f"ovref: {error}", "error")
        return FAILED
    if isinstance(error, OvrefError):
        console.say(f"ovref: {error}", "error")
        return MEND_FIRST
    if isinstance(error, OSError):
        console.say(
            f"ovref: {type(error).__name__}: {error}; if it passes, run the same command to resume",
            "error",
        )
        return FAILED
    return None


if __name__ == "__main__":
    raise SystemExit(main())
