"""What README, CONTRIBUTING and the site say is true: commands parse, files exist, code runs."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from ovref_pipelines import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(name):
    return re.findall(r"```python\n(.*?)```", text_of(name), re.DOTALL)


def commands_of(name):
    """The indented lines of a page that begin with `ovref`, continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", text_of(name)).splitlines()
    return [line.strip() for line in lines if re.match(r"    ovref [a-z]", line)]


COMMANDS = [(name, command) for name in NAMES for command in commands_of(name)]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_parses_and_its_configuration_exists(name, command):
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
    options = cli.parse(words)
    config = getattr(options, "config", "...")
    if config not in (None, "..."):  # an evaluation needs none
        assert (ROOT / config).is_file() or (ROOT / f"configs/{config}.yaml").is_file()


def test_there_are_such_commands():
    assert {command.split()[1] for _, command in COMMANDS} >= {
        "build", "status", "verify", "gc", "evaluate",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_backticks_exist(name):
    pattern = r"`((?:configs|tests|docs|cluster|pipelines)/[\w./]+)`"
    for path in set(re.findall(pattern, text_of(name))):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_code_is_python_and_imports_what_there_is(name):
    for block in code_of(name):
        imports = [
            node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, []), name, "exec"), {})


def test_what_contributors_are_shown_works(tmp_path):
    """Every block of CONTRIBUTING.md runs, and the parts fit each other."""
    import fsspec

    shown = {}
    for block in code_of("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), shown)
    images = [np.full((16, 24, 3), 200, np.uint8)]
    assert shown["MeanColours"]().encode(images).shape == (1, 8, 8, 3)
    (masks_nhw,) = shown["halves"](images)
    assert masks_nhw.shape == (2, 16, 24) and masks_nhw.sum(0).tolist() == [[1] * 24] * 16

    class Collection:
        def search_regions(self, features, k):
            class Support:
                ids = np.arange(len(features))[:, None]
                scores = np.ones((len(features), k), np.float32)

            return Support

        def rows(self, ids):
            return [{"noun": ["cat", "dog"][int(ids[0])]}]

    segmenter = shown["NearestReference"](Collection(), shown["MeanColours"](), shown["halves"])
    (segmentation,) = segmenter.segment(images, ["dog", "cat"])
    assert segmentation.labels_hw[0, [0, 23]].tolist() == [1, 0]
    assert segmentation.scores_chw.shape == (2, 16, 24)
    (tmp_path / "captions.bar").write_text("1|a cat\nno bar\n")
    rows = shown["read_bars"](None, fsspec.filesystem("file"), f"{tmp_path}/captions.bar")
    assert [(row.line, row.text) for row in rows] == [(1, "a cat\n"), (2, None)]


@pytest.mark.parametrize("folder", ["ovref", "inference", "pipelines", "tests", "docs"])
def test_no_docstring_begins_with_of(folder):
    """`Of a file's bytes.` is a genitive without its noun."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # Docstrings of attributes are bare strings too.
            constant = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
            text = getattr(constant, "value", None)
            if isinstance(text, str) and text.lstrip().startswith("Of "):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize(
    "name", [".pre-commit-config.yaml", ".github/workflows/test.yml", "CITATION.cff"]
)
def test_yaml_files_of_the_habits_are_yaml(name):
    assert yaml.safe_load(text_of(name))


def test_the_workflow_runs_the_commands_of_the_readme():
    jobs = yaml.safe_load(text_of(".github/workflows/test.yml"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^(\w[\w-]*):", text_of("Makefile"), re.MULTILINE))
    assert "make test" in runs and {run.removeprefix("make ") for run in runs} <= targets
    assert "make test" in text_of(".ci/run") and "make test" in text_of("README.md")
