"""Steps and reductions in the test's own folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from reduce_fakes import commit_step, reduce_into


@pytest.fixture
def place(tmp_path):
    """A function that commits references as a step in tmp_path and returns its folder."""

    def commit(references, run=0, **options):
        return commit_step(tmp_path / f"run{run}", references, run=run, **options)

    return commit


@pytest.fixture
def reduced(tmp_path):
    """A function that reduces a step into tmp_path/<name>; returns that path and the summary."""

    def run(step, spec=None, name="collection", **options):
        return tmp_path / name, reduce_into(tmp_path / name, step, spec, **options)

    return run
