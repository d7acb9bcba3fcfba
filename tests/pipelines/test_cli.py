"""The command: its surface is pinned, its errors are one clear message, its exit codes mean what
they say."""

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import yaml

from ovref.config import load
from ovref.storage.file_store import Store
from ovref_inference.segmenters import load as loading
from ovref_pipelines import cli, shipped, tool_arguments
from ovref_pipelines.build_config import BuildConfig, output_of, with_absolute_places
from ovref_pipelines.folders import open_steps

BUILD = {
    "output": "out",
    "corpus": {"path": "captions.txt"},
    "synthesize": {"model": "miniature:stable_diffusion", "size_hw": [64, 64]},
    "embed": {
        "visual": {"model": "miniature:dinov2", "size_hw": [64, 64]},
        "text": {"model": "miniature:clip"},
    },
}


@pytest.fixture
def ovref(tmp_path, monkeypatch, capsys):
    """Runs the command beside a config and three captions: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(BUILD))
    (tmp_path / "captions.txt").write_text("a red cup\na boat on water\na tree in snow\n")

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:  # how argparse ends
            code = error.code
        return code, *capsys.readouterr()

    return run


def options_of(parser):
    return sorted(
        option for action in parser._actions for option in action.option_strings or [action.dest]
    )


def test_verbs_and_flags_are_pinned():
    (verbs,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    common = ["--config", "--help", "--print-config", "-h"]
    dry_run = ["--dry-run", "--price", "--probe"]
    place = ["--help", "--json", "--pictures", "-h", "place"]
    assert {verb: options_of(sub) for verb, sub in verbs.choices.items()} == {
        "build": sorted([*common, *dry_run, "--retry-failed"]),
        "retry-failed": sorted(["--config", "--help", "-h", *dry_run]),
        "submit": sorted(
            [*common, "--address", "--again", "--attach", "--detach", "--runtime-env"]
        ),
        "jobs": ["--address", "--all", "--help", "--json", "-h"],
        "cancel": ["--address", "--detach", "--help", "-h", "job"],
        "reduce": common,
        "evaluate": common,
        "train": sorted([*common, "--dry-run"]),
        "compare": sorted(
            ["--help", "--output", "--pictures", "--row", "--second-row", "-h", "first", "second"]
        ),
        "check": sorted([*common, "--random", "--shapes"]),
        "bench": sorted([*common, "--batch-sizes", "--images"]),
        "reproduce": ["--data", "--dry-run", "--help", "--partial", "--runs", "-h", "name"],
        "status": place,
        "inspect": place,
        "reference": ["--build", "--help", "--regenerate", "-h", "collection", "id"],
        "tombstone": [
            "--dry-run", "--help", "--ids", "--json", "--key", "--list", "--noun", "--reason",
            "--source", "--undo", "-h", "collection",
        ],
        "explore": ["--build", "--help", "--host", "--no-browser", "--port", "-h", "place"],
        "verify": ["--help", "-h", "place"],
        "gc": ["--dry-run", "--help", "--older-than", "-h", "output"],
        "segment": sorted(
            ["--classes", "--device", "--formats", "--help", "--method", "--output", "--proposer",
             "--set", "--things", "--workers", "-h", "collection", "images"]
        ),
        "search": sorted(
            ["--box", "--build", "--help", "--image", "--json", "--mask", "--sheet", "-h", "-k",
             "collection", "text"]
        ),
        "coverage": ["--build", "--classes", "--clip", "--help", "--json", "-h", "collection"],
        "grow": sorted(
            ["--config", "--help", "-h", *dry_run, "--captions", "--classes", "--output",
             "--target", "--templates", "place"]
        ),
        "publish": sorted(
            ["--build", "--evaluation", "--help", "--int8", "--no-images", "--replace", "--title",
             "-h", "collection", "target"]
        ),
        "export": sorted(
            ["--build", "--clip-name", "--help", "--name", "--nouns", "--vfm-name", "-h", "-k",
             "collection", "layout", "output"]
        ),
        "import": sorted(
            ["--classes", "--clip-name", "--help", "--images", "--licence", "--name", "--output",
             "--replace", "--size", "--text", "--vfm-name", "--visual", "-h", "files", "layout"]
        ),
        "convert": ["--help", "-h", "kind"],
    }  # fmt: skip
    (kinds,) = [a for a in verbs.choices["convert"]._actions if a.dest == "kind"]
    model = ["--classes", "--help", "-h", "checkpoint", "output"]
    assert {kind: options_of(sub) for kind, sub in kinds.choices.items()} == {
        "fcclip": sorted([*model, "--clip"]),
        "ovseg": model,
        "collection": ["--help", "--partition-references", "-h", "output", "source"],
    }
    shown = {action.dest for action in verbs._choices_actions}
    assert len(shown) == 25 and not {"inspect", "retry-failed"} & shown  # old names, not shown


def test_methods_of_segment_are_those_that_load():
    assert tuple(loading.METHODS) == tool_arguments.METHODS


def test_help_has_examples_and_version_has_a_number(ovref):
    code, printed, _ = ovref("--help")
    assert code == 0 and "ovref build --config" in printed and "examples:" in printed
    assert all(re.search(rf"^  {code} +[a-z]", printed, re.M) for code in (0, 1, 2, 130, 141))
    code, printed, _ = ovref("--version")
    assert code == 0 and re.fullmatch(r"ovref \d+\.\d+\S*\n", printed)


def test_a_dry_run_tells_what_is_missing_and_writes_nothing(ovref, tmp_path):
    code, printed, _ = ovref("build", "--config", "build.yaml", "--dry-run", "--probe", "0")
    assert code == 0
    assert printed.startswith("captions: corpus not read yet, 0 shards committed\n")
    assert [line.partition(":")[0] for line in printed.splitlines()] == [
        "captions",
        "prompts",
        "images",
        "references",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
        (["build", "--config", "build.yaml", "shard_sise=3"], "unknown key shard_sise"),
        (["build", "--config", "build.yaml", "engine.wrokers=3"], "unknown key engine.wrokers"),
        (["build", "--config", "build.yaml", "shard_size=many"], "shard_size"),
        (["build", "--config", "build.yaml", "shard_size=0"], "shard_size must be at least 1"),
        (
            ["build", "--config", "build.yaml", "engine.engine=local", "engine.workers=2"],
            "workers must be 1",
        ),
        (["build", "--config", "build.yaml", "shard_size"], "form key=value"),
        (["build", "--config", "build.yaml", "corpus.path=gone.txt"], "gone.txt: no such file"),
        (["build", "--config", "build.yaml", "output=nope://x"], "output: unknown protocol nope://"),
        (["reduce", "--config", "build.yaml"], "references is not complete"),
        (["inspect", "."], "no output of `ovref build`"),
        (["inspect", "nowhere"], "no output of `ovref build`"),
        (["evaluate", "--config", "build.yaml"], "unknown key"),
        (["retry-failed", "--config", "build.yaml"], "out is no output of `ovref build`"),
        (["tombstone", "nowhere", "--reason", "x"], "by --ids, --key, --source or --noun"),
    ],
)
def test_what_has_to_be_mended_is_one_message_and_exit_code_2(ovref, arguments, says):
    code, printed, error = ovref(*arguments)
    assert code == 2 and printed == ""
    assert says in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("ovref: ")


@pytest.mark.parametrize("arguments", [["build"], ["explode"], [], ["build", "--workers", "3"]])
def test_wrong_arguments_are_argparse_s_exit_code_2(ovref, arguments):
    code, _, error = ovref(*arguments)
    assert code == 2 and "usage: ovref" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "--config", "build.yaml", "--probe", "-3"], "must be 0 or more, found -3"),
        (["build", "--config", "build.yaml", "--probe", "x"], "invalid int value: 'x'"),
        (["build", "--config", "build.yaml", "--price", "nan"], "must be 0 or more, found nan"),
        (["gc", "out", "--older-than", "-1"], "must be 0 or more, found -1"),
        (["gc", "out", "--older-than", "a day"], "invalid float value: 'a day'"),
    ],
)
def test_numbers_out_of_range_are_wrong_arguments(ovref, arguments, says):
    code, _, error = ovref(*arguments)
    assert code == 2 and says in error


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped; nothing committed is lost"),
        ("StoppedError", 130, "ovref: stopped as asked; nothing committed is lost"),
        ("JobError", 1, "too many"),
        (ConnectionError("no route"), 1, "ConnectionError: no route; if it passes"),
    ],
)
def test_exit_codes_of_a_build_that_ends_early(ovref, monkeypatch, raised, code, says):
    from ovref_pipelines import recipe
    from ovref_pipelines.engine.ledger import JobError
    from ovref_pipelines.engine.stopping import StoppedError

    named = {"StoppedError": StoppedError("stopped as asked"), "JobError": JobError("too many")}

    def end(config, say):
        raise named[raised] if isinstance(raised, str) else raised

    monkeypatch.setattr(recipe, "build", end)
    found, _, error = ovref("build", "--config", "build.yaml")
    assert found == code and says in error and "Traceback" not in error


def test_what_cannot_be_resumed_is_not_said_to_be(ovref, monkeypatch):
    from ovref_pipelines import tool_commands

    def end(options, console):
        raise KeyboardInterrupt

    monkeypatch.setitem(tool_commands.TOOLS, "search", end)
    monkeypatch.setitem(tool_commands.TOOLS, "convert", end)
    for command in (
        ("search", "collection", "tree"),
        ("convert", "ovseg", "model.pth", "out", "--classes", "coco_stuff"),
    ):
        code, _, error = ovref(*command)
        assert code == 130 and error == "ovref: stopped; run the same command to start again\n"
    code, _, error = ovref("convert", "collection", "old", "new", "--partition-references", 9)
    assert code == 130 and error.endswith("run the same command to resume\n")


def test_the_help_says_when_a_deletion_needs_a_reason(ovref):
    code, out, _ = ovref("tombstone", "--help")
    assert code == 0 and "needed to delete" in " ".join(out.split())


def commands_in_the_help():
    text = cli.EPILOG.partition("exit codes")[0].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  ovref")]


@pytest.mark.parametrize("arguments", commands_in_the_help(), ids=" ".join)
def test_every_example_of_the_help_is_read_as_it_is_written(arguments):
    from ovref_pipelines.verbs.evaluate import EvaluateConfig
    from ovref_pipelines.verbs.train import TrainConfig

    options = cli.parse(arguments)
    others = ("reproduce", "grow", "check", "convert")
    if hasattr(options, "overrides") and options.verb not in others:
        kinds = {"evaluate": EvaluateConfig, "train": TrainConfig}
        cls = kinds.get(options.verb, BuildConfig)
        config = load(cls, shipped.find(options.config), options.overrides)
        if options.verb == "submit":
            from ovref_pipelines.verbs.submit import entrypoint

            assert "ovref build" in entrypoint(config)


def test_the_dry_run_of_the_help_s_example_accepts_its_captions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a cup\n")
    (arguments,) = [given for given in commands_in_the_help()
                    if given[0] == "build" and "--dry-run" in given]  # fmt: skip
    options = cli.parse(arguments)
    config = load(BuildConfig, shipped.find(options.config), options.overrides)
    assert open_steps(with_absolute_places(config)).captions.committed() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "shard_size=3", "--config", "build.yaml", "output=there"],
        ["build", "--config", "build.yaml", "shard_size=3", "--dry-run", "output=there"],
        ["build", "--dry-run", "shard_size=3", "output=there", "--config", "build.yaml"],
    ],
)
def test_settings_and_options_mix_in_any_order(arguments):
    assert cli.parse(arguments).overrides == ["shard_size=3", "output=there"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "--config", "build.yaml", "--probe", "3"], "--probe needs --dry-run"),
        (["retry-failed", "--config", "build.yaml", "--probe", "3"], "--probe needs --dry-run"),
        (["status", "out", "more"], "unrecognized arguments: more"),
        (["submit"], "submit needs --config, or --attach with the name of a job"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(ovref, tmp_path, arguments, says):
    code, _, error = ovref(*arguments)
    assert code == 2 and says in error
    assert not (tmp_path / "out").exists()


def test_attach_takes_the_name_of_a_job_or_none():
    assert cli.parse(["submit", "--attach", "ovref-first-12"]).attach == "ovref-first-12"
    options = cli.parse(["submit", "--config", "fossil", "--attach", "output=s3://b/x"])
    assert options.attach == "" and options.overrides == ["output=s3://b/x"]


@pytest.mark.parametrize("probe", ["0", "4"])
@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("captions.txt", b"a \xff cup\n" * 3, "no usable caption: .*undecodable_text': 3"),
        ("captions.txt", b"\n\n", "no usable caption|holds no record"),
        ("captions.json", b"a red cup\n", "captions.json"),
    ],
)
def test_a_dry_run_refuses_the_captions_that_a_build_refuses(
    ovref, tmp_path, name, data, says, probe
):
    (tmp_path / name).write_bytes(data)
    setting = f"corpus.path={name}"
    code, _, error = ovref(
        "build", "--config", "build.yaml", "--dry-run", "--probe", probe, setting
    )
    assert code == 2 and re.search(says, error)
    found, _, of_build = ovref(
        "build", "--config", "build.yaml", setting, "engine.engine=local"
    )
    assert found == 2 and re.search(says, of_build)


@pytest.mark.parametrize(
    ("setting", "folder"),
    [("output=run #1", "run #1"), ("output=2024-01-01", "2024-01-01"), ("output=~/x", "home/x"),
     ("output=file:x", "file:x")],
)  # fmt: skip
def test_an_output_is_the_folder_that_was_named(tmp_path, monkeypatch, setting, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(BUILD))
    config = with_absolute_places(load(BuildConfig, "build.yaml", [setting]))
    assert config.output == str(tmp_path / folder)
    assert output_of(config).store.url == str(tmp_path / folder)


@pytest.mark.parametrize("arguments", [
    ["build", "--config", "build.yaml", "output=a::b/run"],
    ["status", "a::b"], ["gc", "foo://x"], ["verify", "foo://x"], ["inspect", "foo://x"],
    ["reference", "foo://x", "1"], ["tombstone", "foo://x", "--noun", "a", "--reason", "b"],
    ["evaluate", "--config", "miniature_evaluate", "output=s3://bucket/x"],
    ["build", "--config", "build.yaml", "output=x", "output=y"],
])  # fmt: skip
def test_a_place_that_is_none_is_refused_by_every_verb(ovref, tmp_path, arguments):
    before = sorted(tmp_path.iterdir())
    code, _, error = ovref(*arguments)
    assert code == 2 and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


HEAVY = {
    "torch", "ray", "spacy", "diffusers", "s3fs", "psutil", "matplotlib", "transformers", "aiohttp",
    "open_clip", "scipy", "skimage", "lemminflect", "huggingface_hub", "yaml", "pydantic",
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "missing", "extra"),
    [
        ("status OUT", HEAVY - {"yaml", "pydantic"}, None),
        ("verify OUT", HEAVY - {"yaml", "pydantic"}, None),
        ("gc OUT", HEAVY - {"yaml", "pydantic"}, None),
        ("reference OUT/collection 0", HEAVY - {"yaml", "pydantic"}, None),
        ("build --config miniature output=OUT/more", HEAVY - {"yaml", "pydantic"}, "cpu,build"),
        ("status OUT", HEAVY, "cpu,cli"),
        ("status OUT --pictures OUT/x.png", {"matplotlib"}, "cpu,build"),
        ("explore OUT", HEAVY | {"starlette"}, "cpu,explore"),
        ("evaluate --config miniature_evaluate", HEAVY, "cpu,build"),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_pip_line(
    finished_build, tmp_path, verb, missing, extra
):
    (tmp_path / "light.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {missing}:\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from ovref_pipelines.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    code, _, error = run_outside(
        f'"$OVREF" {tmp_path}/light.py {verb.replace("OUT", str(finished_build))}'
    )
    if extra is None:
        assert (code, error) == (0, "")
    else:
        assert code == 2 and f"`pip install 'ovref[{extra}]'`" in error
        assert error.count("\n") == 1 + error.count("models: loading") + error.count("build: ")


def run_outside(code, **environment):
    """The command in a process of its own: (exit code, stdout, stderr)."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OVREF": sys.executable} | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_closed_pipe_and_an_encoding_that_lacks_the_letters(finished_build, tmp_path):
    for unbuffered in ("", "1"):
        code, _, error = run_outside(
            f'"$OVREF" -m ovref_pipelines status {finished_build} | true',
            PYTHONUNBUFFERED=unbuffered,
        )
        assert (code, error) == (141, "")
    named = tmp_path / "käse"
    shutil.copytree(finished_build, named)
    code, printed, error = run_outside(
        f'"$OVREF" -m ovref_pipelines status {named}', PYTHONIOENCODING="ascii"
    )
    assert (code, error) == (0, "") and "k\\xe4se/collection" in printed


@pytest.mark.parametrize("module", ["argparse", "ovref_pipelines.cli", "ovref_pipelines.commands"])
def test_ctrl_c_while_modules_are_loaded_is_one_sentence(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os, signal\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, _, error = run_outside('"$OVREF" -m ovref_pipelines status nowhere', PYTHONPATH=path)
    assert code == 130 and error.startswith("ovref: stopped;") and error.count("\n") == 1


def test_every_line_of_the_json_log_is_json(ovref, monkeypatch):
    library = logging.getLogger("a_library_with_a_handler_of_its_own")

    def noisy(config, say):
        say("captions: reading")
        print("printed\n\nin two lines")
        print("a line without an end", end="")
        warnings.warn("a warning", UserWarning, stacklevel=1)
        logging.getLogger("library").warning("two\nlines")
        handler = logging.StreamHandler()
        library.addHandler(handler)
        library.propagate = False
        library.error("by a handler")
        library.removeHandler(handler)
        threads = [threading.Thread(target=say, args=(f"thread: {i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("ovref_pipelines.recipe.build", noisy)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    streams = sys.stdout, sys.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(sys, "warnoptions", ["always"])
        code, printed, error = ovref("build", "--config", "build.yaml", "engine.log=json")
    assert code == 1 and (sys.stdout, sys.stderr) == streams
    lines = [json.loads(line) for line in (printed + error).splitlines()]
    assert all({"time", "step", "event", "message"} <= set(line) for line in lines)
    said = [line["message"] for line in lines]
    assert {"printed", "in two lines", "a line without an end", "by a handler"} <= set(said)
    assert "library: two\nlines" in said
    assert any("UserWarning: a warning" in text for text in said)
    assert sum(text.startswith("thread: ") for text in said) == 8
    assert lines[-1]["event"] == "error" and "in noisy" in lines[-1]["traceback"]

    for wrong in ("shard_size=0", "nothing=1"):
        code, printed, error = ovref("build", "--config", "build.yaml", "engine.log=json", wrong)
        assert code == 2 and json.loads(error)["event"] == "error" and not printed


def test_configurations_are_found_by_name(ovref):
    assert shipped.find("fossil") == shipped.folder() / "fossil.yaml"
    code, _, error = ovref("build", "--config", "fosil")
    assert code == 2 and "there is no such file" in error
    assert "fossil, fossil_2026, fossil_fast" in error


@pytest.fixture(scope="module")
def finished_build(tmp_path_factory):
    import small_build

    folder = tmp_path_factory.mktemp("finished")
    small_build.build(Store.open(str(folder / "out")), folder / "work")
    return folder / "out"


def test_printed_settings_are_a_configuration(ovref, tmp_path):
    code, printed, _ = ovref(
        "build", "--config", "miniature", "--print-config", "output=out", "synthesize.steps=7"
    )
    (tmp_path / "printed.yaml").write_text(printed)
    (found, wanted) = (
        load(BuildConfig, path, overrides)
        for path, overrides in (
            (tmp_path / "printed.yaml", ()),
            (shipped.find("miniature"), ["output=out", "synthesize.steps=7"]),
        )
    )
    assert code == 0 and found == wanted and found.synthesize.steps == 7
    assert "# Captions per shard, the unit of work and commit" in printed
    code, printed, _ = ovref("build", "--config", "own_captions", "--print-config")
    assert code == 0 and "\n  path:  # required\n" in printed
    code, _, err = ovref("build", "--config", "miniature", "--print-config", "synthesize.step=7")
    assert code == 2 and "unknown key synthesize.step" in err
    for verb, name in (("evaluate", "miniature_evaluate"), ("train", "miniature_clip_rc")):
        code, printed, _ = ovref(verb, "--config", name, "--print-config")
        assert code == 0 and yaml.safe_load(printed).keys() >= {"output", "engine"}, printed
    assert not (tmp_path / "out").exists()


def test_an_evaluation_needs_no_configuration(capsys):
    assert cli.main(["evaluate", "collection=nowhere", "output=x", "scenes=0"]) == 2
    said = capsys.readouterr().err
    assert "scenes" in said and "--config" not in said
