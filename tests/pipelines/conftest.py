"""One small Ray for all tests of this folder, and the fakes on the path of its workers."""

import gc
import os
import sys
import warnings
from pathlib import Path

import pytest

from ovref_pipelines.engine.config import EngineConfig

FOLDER = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
os.environ["RAY_AUTH_MODE"] = "disabled"  # nothing is written into the home folder
sys.path.insert(0, FOLDER)


@pytest.fixture(scope="session")
def local_ray():
    """Ray with three workers' worth of CPUs, whatever this machine has."""
    from ovref_pipelines.ray import cluster as ray_cluster

    ray_cluster.join(EngineConfig(engine="ray", workers=3))
    yield
    ray_cluster.ray.shutdown()
    with warnings.catch_warnings():
        # Ray's processes were asked to end, but are not waited for.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def on(monkeypatch):
    """Puts the driver on a stand-in for Ray with these nodes."""
    from fake_ray import FakeRay, FakeTable

    from ovref_pipelines.ray import cluster as ray_cluster
    from ovref_pipelines.ray import engine as ray_engine
    from ovref_pipelines.ray import reports as ray_reports
    from ovref_pipelines.ray import workers as ray_workers

    def put(**nodes):
        fake = FakeRay(**nodes)
        for module in (ray_engine, ray_workers):
            monkeypatch.setattr(module, "ray", fake)
        monkeypatch.setattr(ray_reports, "internal_kv", FakeTable())
        monkeypatch.setattr(ray_engine, "join", lambda config: None)
        monkeypatch.setattr(ray_engine, "NOTICE_SECONDS", 0.02)
        monkeypatch.setattr(ray_engine, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(ray_engine, "offer", lambda: "what there is")
        for module in (ray_engine, ray_cluster):
            monkeypatch.setattr(module, "living_nodes", fake.living_nodes)
            monkeypatch.setattr(module, "leaving_nodes", fake.leaving_nodes)
        monkeypatch.setattr(ray_cluster, "free_resources", fake.free_resources)
        return fake

    return put


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory):
    """Output of a build of a dozen captions with the miniature's models and two steps of drawing:
    enough to search, segment and publish, but nothing to look at."""
    import ovref

    output = tmp_path_factory.mktemp("tiny")
    ovref.build(
        "miniature",
        {
            "output": output,
            "corpus.limit": 12,
            "shard_size": 6,
            "synthesize": {"steps": 2, "batch_size": 6},
            "engine": {"engine": "local", "workers": 1},
        },
        say=lambda message: None,
    )
    return output
