"""The command: its surface is pinned, its errors are one clear message, its exit codes mean what
they say."""

import argparse
import re

import pytest
import yaml

from ovref_pipelines import cli

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
    common = ["--config", "--help", "-h", "overrides"]
    assert {verb: options_of(sub) for verb, sub in verbs.choices.items()} == {
        "build": sorted([*common, "--dry-run", "--price", "--probe"]),
        "submit": sorted(
            [*common, "--address", "--again", "--attach", "--detach", "--runtime-env"]
        ),
        "retry-failed": sorted([*common, "--dry-run"]),
        "reduce": common,
        "evaluate": common,
        "bench": sorted([*common, "--batch-sizes", "--images"]),
        "inspect": ["--help", "--pictures", "-h", "place"],
        "reference": ["--build", "--help", "--regenerate", "-h", "collection", "id"],
        "tombstone": ["--help", "--key", "--noun", "--reason", "--source", "-h", "collection"],
        "status": ["--help", "--json", "-h", "output"],
        "verify": ["--help", "-h", "place"],
        "gc": ["--dry-run", "--help", "--older-than", "-h", "output"],
    }


def test_help_has_examples_and_version_has_a_number(ovref):
    code, printed, _ = ovref("--help")
    assert code == 0 and "ovref build --config" in printed and "examples:" in printed
    code, printed, _ = ovref("--version")
    assert code == 0 and re.fullmatch(r"ovref \d+\.\d+\S*\n", printed)


def test_a_dry_run_tells_what_is_missing_and_writes_nothing(ovref, tmp_path):
    code, printed, _ = ovref("build", "--config", "build.yaml", "--dry-run", "--probe", "0")
    assert code == 0
    assert printed.startswith("captions: corpus to be read, 0 shards there already\n")
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
        (["build", "--config", "build.yaml", "corpus.path=gone.txt"], "no caption corpus at gone"),
        (["build", "--config", "build.yaml", "output=nope://x"], "cannot open the store nope://x"),
        (["reduce", "--config", "build.yaml"], "references is not complete"),
        (["inspect", "."], "no output of `ovref build`"),
        (["inspect", "nowhere"], "no output of `ovref build`"),
        (["evaluate", "--config", "build.yaml"], "unknown key"),
        (["retry-failed", "--config", "build.yaml"], "out is no output of `ovref build`"),
        (["tombstone", "nowhere", "--reason", "x"], "by --key, --source or --noun"),
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
