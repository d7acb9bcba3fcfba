"""The papers' tables in small, by one command: parameters from validation scenes, tables from test
scenes, each part kept as soon as it is done.

A part is done again only if something that it depends on has changed: settings, collections (by
their fingerprints) or models of the miniature (by their weights' checksums).
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovref.config import dump, parse
from ovref.evaluation.picture_grids import prediction_grid
from ovref.evaluation.predictions import Prediction
from ovref.identity import fingerprint
from ovref.miniature.shapes import UNSEEN
from ovref_inference.models import MINIATURE, resolve
from paper_tables.datasets import Dataset, miniature_scenes, with_unseen
from paper_tables.parts import Parts
from paper_tables.predictions import single_metric
from paper_tables.published import TABLES, TableBench, all_segmenters
from paper_tables.report import markdown
from paper_tables.spec import Segmenters, TablesSpec
from paper_tables.tune import coordinate_search

CAPTION = (
    "Measured on the miniature: small models trained on drawn scenes. These numbers show whether "
    "the methods' parts work together as in the papers; they say nothing about the real models."
)
"""Stands above the tables."""

SHARES = tuple(step / 10 for step in range(11))
OPTIONS: dict[str, dict[str, Sequence[Any]]] = {
    "fossil": {"n": (5, 10, 20, 40, 80), "k": (1, 3, 5, 10), "gamma": (0.0, 0.25, 0.5, 0.75, 1.0)},
    "freeda": {"n": (5, 10, 20, 40, 80), "local": (0.5, 0.8, 0.9, 1.0)},
    "corrclip": {"support": SHARES, "k": (1, 5, 10, 20, 40)},
    "vocseg": {
        "alpha": SHARES,
        "tau": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        "k": (1, 3, 5, 10, 20),
        "beta": (0.3, 0.5, 0.7, 0.9, 1.0),
    },
    "retclip": {
        # The temperature first, for gamma's reach depends on it: text that is too sure of itself
        # leaves retrieval nothing at the paper's gamma, and a gamma near 1 leaves text nothing.
        "tau": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        "gamma": SHARES,
        "k": (1, 5, 10, 20, 40),
        "alpha": (0.2, 0.4, 0.6, 0.8, 1.0),
        "beta": (0.5, 0.7, 0.8, 0.9, 1.0),
    },
}
"""Values tried for each segmenter's parameters, in this order."""


def make_tables(
    spec: TablesSpec, progress: Callable[[str], None] = print, device: str | None = None
) -> dict[str, Any]:
    """Measures all tables and writes them as Markdown and JSON, with pictures.

    Args:
        spec: what and on what.
        progress: receives lines for people.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    Returns:
        What tables.json holds: title, caption, facts, the chosen parameters, the tables
        (`report.table`), names of pictures.

    Raises:
        CollectionError: a collection cannot be opened, or does not say its encoders.
        ModelError: a model cannot be loaded.
        ValueError: a collection is not of the kind that its segmenter needs.
    """
    output = Path(spec.output)
    (output / "parts").mkdir(parents=True, exist_ok=True)
    test = with_unseen(miniature_scenes("test", spec.scenes), UNSEEN)
    tuning = [miniature_scenes("validation", spec.tuning_scenes)] if spec.tuning_scenes else []
    with Parts(spec, [test, *tuning], device) as parts:
        ground = _identity(spec, parts)

        def done(name: str, identity: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            return _once(output / "parts" / f"{name}.json", [ground, identity], make, progress)

        chosen = spec.segmenters
        if tuning:
            plain = done("chosen", None, lambda: dump(choose(parts, tuning[0], progress)))
            chosen = parse(Segmenters, plain)
        bench = TableBench(parts=parts, data=test, chosen=chosen)
        tables = [
            done(name, [spec.scenes, dump(chosen)], lambda measure=measure: measure(bench))
            for name, measure in TABLES.items()
        ]
        pictures = {}
        if spec.pictures:
            path = output / "segmenters.png"
            identity = [spec.scenes, spec.pictures, dump(chosen)]
            done("pictures", identity, lambda: draw(bench, spec.pictures, path))
            pictures = {"Predictions": path.name}
        facts = _facts(spec, parts, test, chosen)
    document = {
        "title": "The papers' tables in small",
        "caption": CAPTION,
        "facts": facts,
        "chosen": dump(chosen),
        "tables": tables,
        "pictures": pictures,
        "spec": dump(spec),
    }
    (output / "tables.json").write_text(json.dumps(document, indent=1) + "\n")
    (output / "tables.md").write_text(markdown(document, spec.reasons))
    return document


def choose(
    parts: Parts, data: Dataset, progress: Callable[[str], None] = lambda line: None
) -> Segmenters:
    """Parameters of every segmenter, one field after the other, on validation scenes.

    mIoU decides, for RetCLIP PQ (its table 4). RetCLIP's tau, gamma and k are those of the
    training-free method, alpha and beta then those of the trained one.
    """
    start = parts.spec.segmenters

    def best(
        name: str,
        predict: Callable[[Any], list[Prediction]],
        metric: str,
        config: Any,
        *fields: str,
    ) -> Any:
        options = {field: OPTIONS[name][field] for field in fields or OPTIONS[name]}
        found = coordinate_search(
            config,
            options,
            lambda tried: single_metric(data, predict(tried), metric),
            lambda line: None,
        )
        shown = {field: getattr(found, field) for field in options}
        progress(f"{name}: {', '.join(f'{k} = {v}' for k, v in shown.items())}")
        return found

    def with_masks(predict: Callable[..., list[Prediction]], proposals: str) -> Callable:
        return lambda config: predict(data, config, proposals)

    retclip = best(
        "retclip", with_masks(parts.retclip, "grounded_sam"), "pq", start.retclip,
        "tau", "gamma", "k",
    )  # fmt: skip
    return Segmenters(
        fossil=best("fossil", with_masks(parts.fossil, "opencut"), "miou", start.fossil),
        freeda=best("freeda", lambda config: parts.freeda(data, config), "miou", start.freeda),
        corrclip=best("corrclip", with_masks(parts.corrclip, "sam_grid"), "miou", start.corrclip),
        vocseg=best("vocseg", with_masks(parts.vocseg, "trained"), "miou", start.vocseg),
        retclip=best(
            "retclip", with_masks(parts.retclip, "trained"), "pq", retclip, "alpha", "beta"
        ),
    )


def draw(bench: TableBench, count: int, path: Path) -> dict[str, Any]:
    """Draws what every segmenter says of some scenes; returns which scenes."""
    data = bench.data
    step = max(1, len(data.images) // count)
    chosen = list(range(0, len(data.images), step))[:count]
    own = {n: found for n, found in all_segmenters(bench).items() if "true masks" not in n}
    prediction_grid(
        [data.images[i] for i in chosen],
        {"truth": [data.labels[i] for i in chosen]}
        | {name: [found[i].labels_hw for i in chosen] for name, found in own.items()},
        data.classes,
        path,
        colours=data.colours,
    )
    return {"scenes": chosen}


def _once(
    path: Path, identity: Any, make: Callable[[], dict[str, Any]], progress: Callable[[str], None]
) -> dict[str, Any]:
    """What `make` gives, from the file if it was made with the same identity."""
    mark = fingerprint(identity)
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["identity"] == mark:
            progress(f"{path.stem}: as before")
            return kept["result"]
    started = time.monotonic()
    result = make()
    path.write_text(json.dumps({"identity": mark, "result": result}, indent=1) + "\n")
    progress(f"{path.stem}: {time.monotonic() - started:.0f} s")
    return result


def _identity(spec: TablesSpec, parts: Parts) -> list[Any]:
    """Everything that numbers depend on, but for the scenes and parameters of a table."""
    settings = dump(replace(spec, output="", builds=(), reasons={}, pictures=0, scenes=1))
    collections = {
        name: parts.named(name).manifest.fingerprint for name in settings.pop("collections")
    }
    models = sorted(set(_models(settings)) | set(_encoders(parts, collections)))
    return [settings, collections, {model: _checksum(model) for model in models}]


def _models(settings: Any) -> Iterable[str]:
    """All values of keys `model`, at any depth."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from [value] if key == "model" and isinstance(value, str) else _models(value)


def _encoders(parts: Parts, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        collection = parts.named(name)
        yield from (collection.visual_config.model, collection.text_config.model)


def _checksum(model: str) -> str:
    """The checksum of a shipped model's files; a model from elsewhere is known by its name."""
    if not model.startswith(MINIATURE):
        return ""
    digest = hashlib.sha256()
    for path in sorted(Path(resolve(model)).rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _facts(spec: TablesSpec, parts: Parts, test: Dataset, chosen: Segmenters) -> list[str]:
    counts = {
        name: len(parts.named(name))
        for name in ("fossil", "vocseg_binary", "vocseg_heatmap", "vocseg_none", "retclip")
    }
    where = "left as configured"
    if spec.tuning_scenes:
        where = f"chosen on {spec.tuning_scenes} validation scenes"
    facts = [
        f"Measured on {test.name}; parameters {where}.",
        "References: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + ".",
    ]
    for name, options in OPTIONS.items():
        config = getattr(chosen, name)
        values = ", ".join(f"{field} = {getattr(config, field)}" for field in options)
        facts.append(f"{name}: {values}.")
    return facts
