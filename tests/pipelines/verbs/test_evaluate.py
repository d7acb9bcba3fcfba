"""Evaluation on the engine: the same totals on any number of workers; committed shards are kept."""

import json
from dataclasses import replace

import pytest
from fake_ray import Node
from pipeline_fakes import files_of

from ovref.config import load
from ovref.evaluation import counting
from ovref.evaluation.compare import open_run
from ovref.storage.file_store import Store
from ovref.storage.steps import existing_step
from ovref_pipelines import cli
from ovref_pipelines.console import Console
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.errors import JobError
from ovref_pipelines.verbs.evaluate import EvaluateConfig, evaluate, with_absolute_places
from scene_collections import collection_url

__all__ = ["collection_url"]


@pytest.fixture(scope="module")
def config(collection_url, tmp_path_factory):
    return EvaluateConfig(
        collection=collection_url,
        output=str(tmp_path_factory.mktemp("run") / "out"),
        scenes=7,
        rows=("fossil_no_proposals", "text_only"),
        shard_size=2,
        pictures=0,
        engine=EngineConfig(engine="local"),
    )


@pytest.fixture(scope="module")
def local(config):
    return evaluate(config, Console()), files(config)


def files(config):
    return files_of(existing_step(Store.open(config.output), "scores"))


def same(found, result):
    return all(found[name] == result[name] for name in ("rows", "per_class", "class_fingerprint"))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_of_ray_count_what_one_process_counts(config, local, on, tmp_path, workers):
    on(a=Node(cpus=4))
    engine = EngineConfig(engine="ray", workers=workers)
    changed = replace(config, engine=engine, output=str(tmp_path))
    found = evaluate(changed, Console())
    assert same(found, local[0]) and files(changed) == local[1] and len(local[1]) == 8


@pytest.mark.slow
def test_ray_itself_counts_the_same(config, local, local_ray, tmp_path):
    engine = EngineConfig(engine="ray", workers=3)
    changed = replace(config, engine=engine, output=str(tmp_path))
    assert same(evaluate(changed, Console()), local[0]) and files(changed) == local[1]


def test_a_shard_that_fails_is_tried_again_by_the_next_run(
    config, local, monkeypatch, on, tmp_path
):
    """One image fails twice, which quarantines its shard; the others are committed and kept."""
    on(a=Node(cpus=4))
    changed = replace(config, engine=EngineConfig(engine="ray"), output=str(tmp_path))
    real, scored, failures = counting.counts_of, [], []

    def fail(example, *rest):
        scored.append(example.id)
        if example.id == "3" and len(failures) < 2:
            failures.append(example.id)
            raise ValueError("no luck")
        return real(example, *rest)

    monkeypatch.setattr(counting, "counts_of", fail)
    with pytest.raises(JobError, match="1 shards of images failed permanently, among them 000001"):
        evaluate(changed, Console())
    assert not (tmp_path / "evaluation.json").exists()
    scored.clear()
    assert same(evaluate(changed, Console()), local[0])
    assert set(scored) == {"2", "3"} and files(changed) == local[1]


def test_the_verbs_evaluate_and_compare(config, local, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["scenes=3", "rows=[fossil_no_proposals, text_only]", "pictures=0"]
    arguments = ["evaluate", f"collection={config.collection}", "output=out", *settings]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "FOSSIL without proposals" in printed.out and "written to" in printed.out
    assert open_run("out").names == ("0", "1", "2")
    assert cli.main(["compare", "out", "out", "--second-row", "text only", "--output", "both"]) == 0
    assert "Images that made the difference" in capsys.readouterr().out
    found = json.loads((tmp_path / "both/compare.json").read_text())
    assert found["first"]["row"] == "FOSSIL without proposals"
    assert cli.main(["compare", "out", "gone", "--output", "both"]) == 2
    assert "gone is not a finished evaluation" in capsys.readouterr().err
    assert cli.main([*arguments, "fossil.n=3"]) == 2
    assert "settings.fossil.n was 20 and is now 3" in capsys.readouterr().err


def test_places_are_seen_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = {"images": "a", "labels": "b", "classes": "c.txt"}
    settings = [f"folder={json.dumps(folder)}", "collection=x", "output=y", "features=z"]
    found = with_absolute_places(load(EvaluateConfig, None, settings))
    places = [found.collection, found.output, found.features]
    places += [found.folder.images, found.folder.labels, found.folder.classes]
    assert places == [str(tmp_path / name) for name in ("x", "y", "z", "a", "b", "c.txt")]
    assert found.engine.engine == "local"
    assert found.spec.folder == found.folder and not hasattr(found.spec, "engine")
