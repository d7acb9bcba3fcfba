"""One small Ray for all tests of this folder, and the fakes on the path of its workers."""

import os
import sys
from pathlib import Path

import pytest

FOLDER = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
os.environ["RAY_AUTH_MODE"] = "disabled"  # nothing is written into the home folder
sys.path.insert(0, FOLDER)


def pytest_configure(config):
    # ray.shutdown() signals Ray's processes and does not wait for them.
    still_running = "ignore:subprocess .* is still running:ResourceWarning"
    config.addinivalue_line("filterwarnings", still_running)


@pytest.fixture(scope="session")
def local_ray():
    """Ray with three workers' worth of CPUs, whatever this machine has."""
    import ray

    ray.init(
        "local", num_cpus=3, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", object_store_memory=80 << 20,
    )
    yield
    ray.shutdown()
