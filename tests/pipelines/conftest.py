"""One small Ray for all tests of this folder, and the fakes on the path of its workers."""

import gc
import os
import sys
import warnings
from pathlib import Path

import pytest
from ovref_pipelines.engine_config import EngineConfig

FOLDER = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
os.environ["RAY_AUTH_MODE"] = "disabled"  # nothing is written into the home folder
sys.path.insert(0, FOLDER)


@pytest.fixture(scope="session")
def local_ray():
    """Ray with three workers' worth of CPUs, whatever this machine has."""
    from ovref_pipelines import ray_engine

    ray_engine.join(EngineConfig(engine="ray", workers=3))
    yield
    ray_engine.ray.shutdown()
    with warnings.catch_warnings():
        # Ray's processes were told to end, but are not waited for.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
