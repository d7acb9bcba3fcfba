"""A row of a paper's table as a configuration: the build or the training, the evaluation, and the
published figures.

The files are in `configs/papers`. A file may have `extends: <file>` beside it, whose settings it
overrides. In strings, `{data}` and `{runs}` stand for the folders of data sets and of results. A
training that begins with another row's has `after: <row>`, and a collection that falls back on
another row's has `fallback: <row>`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovref.config import STRICT, load_tree, read_tree
from ovref.errors import ConfigError
from ovref.evaluation.report import COLUMNS
from ovref.evaluation.spec import TITLES
from ovref_pipelines import shipped
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.verbs.evaluate import EvaluateConfig
from ovref_pipelines.verbs.train import TrainConfig

EXTENDS, AFTER, FALLBACK = "extends", "after", "fallback"


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of a table, and how to reproduce it."""

    __pydantic_config__ = STRICT

    paper: str
    """Paper, table and row, for people."""
    figures: dict[str, float]
    """The published figures in percent, by `evaluation.report.COLUMNS`."""
    row: str
    """The matching row of the evaluation: one of `evaluation.spec.TITLES`."""
    needs: tuple[str, ...]
    """Data and weights, for people."""
    gpu_hours: float
    """Estimate for one H100: building, shared by the rows of one collection, or training, and
    evaluating."""
    evaluate: EvaluateConfig
    """The evaluation of the collection or of the trained head."""
    build: BuildConfig | None = None
    """The collection; or instead of it, `train`."""
    fallback: BuildConfig | None = None
    """The collection that supplies references of classes that the first one lacks; in a file the
    name of the row that it belongs to."""
    train: TrainConfig | None = None
    """The training of a head."""
    first: TrainConfig | None = None
    """The training with whose middle checkpoint `train` begins; in a file `after: <row>` names the
    row that it belongs to."""
    captions: int | None = None
    """Published number of captions in the corpus; null if unknown."""
    leaves_open: tuple[str, ...] = ()
    """What the paper does not specify, and what is used here."""
    differs: tuple[str, ...] = ()
    """Differences from the paper."""
    blocked: tuple[str, ...] = ()
    """Why it cannot be run yet; empty if it can."""

    def __post_init__(self) -> None:
        if (self.build is None) == (self.train is None):
            raise ValueError("a row has either a build or a training")
        if (self.first is not None) != (self.train is not None and bool(self.train.start)):
            raise ValueError("after names the row whose training train.start is of")
        if (self.fallback is None) != (not self.evaluate.fallback):
            raise ValueError("fallback names the row whose collection evaluate.fallback is")
        method = self.evaluate.method
        rows = self.evaluate.rows if method == "collection" else (method,)
        if self.row not in TITLES or self.row not in rows:
            raise ValueError(f"row must be one of {', '.join(rows)}, found {self.row!r}")
        unknown = sorted(set(self.figures) - set(COLUMNS))
        if unknown or not self.figures:
            raise ValueError(f"figures must be of {', '.join(COLUMNS)}, found {unknown or 'none'}")


def folder() -> Path:
    """Folder of the files."""
    return shipped.folder() / "papers"


def names() -> list[str]:
    """The names of all rows; files that begin with an underscore are only meant to be extended."""
    return sorted(path.stem for path in folder().glob("*.yaml") if not path.stem.startswith("_"))


def find(name: str) -> Path:
    """The file of a row: a path, or the name of a shipped one.

    Raises:
        ConfigError: neither exists.
    """
    if Path(name).suffix == ".yaml" and Path(name).exists():
        return Path(name)
    if name not in names():
        raise ConfigError(f"there is no row {name!r}; choose from {', '.join(names())}")
    return folder() / f"{name}.yaml"


def read_row(
    path: Path, *, data: str, runs: str, overrides: list[str] | tuple[str, ...] = ()
) -> PaperRow:
    """Reads a row.

    Args:
        path: from `find`.
        data: folder of data sets.
        runs: folder of results, for collections and evaluations.
        overrides: `build.a=value`, `train.b=value` and `evaluate.c=value`.

    Raises:
        ConfigError: as `config.load`; or a file extends one that is not there, or itself, or the
            row that it names does not fit.
    """
    tree = _layered(path, ())
    places = {"{data}": data, "{runs}": runs}
    tree = _placed(tree, places)
    build, evaluate, train = tree.get("build"), tree.get("evaluate"), _trained(tree, path, runs)
    if isinstance(evaluate, dict):
        evaluate.setdefault("output", f"{runs}/{path.stem}")
        if isinstance(build, dict):
            evaluate.setdefault("collection", f"{build.get('output')}/collection")
        if isinstance(train, dict):
            evaluate["clip_rc"] = {"weights": train["output"]} | evaluate.get("clip_rc", {})
    if after := tree.pop(AFTER, None):
        other = path.parent / f"{after}.yaml"
        first = _trained(_placed(_layered(other, ()), places), other, runs)
        if not isinstance(train, dict) or not isinstance(first, dict):
            raise ConfigError(f"{path} and {other} must both have a training, because of {AFTER}")
        train.setdefault("start", first["output"])
        tree["first"] = first
    if isinstance(name := tree.get(FALLBACK), str):
        other = path.parent / f"{name}.yaml"
        second = _placed(_layered(other, ()), places).get("build")
        if not isinstance(second, dict) or not isinstance(evaluate, dict):
            raise ConfigError(f"{path} and {other} must both have a build, because of {FALLBACK}")
        evaluate.setdefault(FALLBACK, f"{second.get('output')}/collection")
        tree[FALLBACK] = second
    return load_tree(PaperRow, tree, str(path), overrides)


def _trained(tree: dict[str, Any], path: Path, runs: str) -> Any:
    """The training of a row, which has an output of its own unless it names one."""
    train = tree.get("train")
    if isinstance(train, dict):
        train.setdefault("output", f"{runs}/{path.stem}_training")
    return train


def _layered(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file merged over those of the file that it extends."""
    if path in seen:
        raise ConfigError(f"{path} extends itself, by way of {', '.join(map(str, seen))}")
    tree = read_tree(path)
    base = tree.pop(EXTENDS, None)
    if base is None:
        return tree
    return _over(_layered(path.parent / f"{base}.yaml", (*seen, path)), tree)


def _over(below: Any, above: Any) -> Any:
    """Mappings key by key; anything else replaces what is below."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    found = dict(below)
    for key, value in above.items():
        found[key] = _over(found[key], value) if key in found else value
    return found


def _placed(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _placed(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, places) for item in value]
    if isinstance(value, str):
        for mark, place in places.items():
            value = value.replace(mark, place)
    return value
