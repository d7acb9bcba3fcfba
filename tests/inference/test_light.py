"""The light half stays light: what importing it loads, and that it works with nothing else."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import ovref_inference

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "scipy", "transformers", "PIL", "ray", "spacy", "diffusers", "open_clip", "s3fs")

QUERY = """
import json, sys
import numpy as np
from ovref_inference import ReferenceCollection

with ReferenceCollection.open(sys.argv[1]) as collection:
    support = collection.search_text(collection.textual[:2], k=3)
    regions = collection.search_regions(collection.visual[:2], k=3)
    prototypes = collection.prototypes(["dog", "lion"], k=2)
    found = {
        "own": [int(support.ids[i, 0]) for i in range(2)],
        "nouns": regions.nouns[0][:1],
        "counts": prototypes.counts.tolist(),
        "heavy": [name for name in json.loads(sys.argv[2]) if name in sys.modules],
    }
print(json.dumps(found))
"""


def test_importing_loads_nothing_heavy_nor_the_builder():
    rooms = "ovref_inference, ovref_inference.encoders, ovref_inference.proposers"
    rooms += ", ovref_inference.segmenters, ovref_inference.collection.reference_collection"
    program = f"import sys, {rooms}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "ovref_inference.collection.reference_collection" in loaded
    assert not loaded & {*HEAVY, "ovref", "faiss"}


def test_opening_and_asking_loads_nothing_heavy(published):
    done = subprocess.run(
        [sys.executable, "-c", QUERY, str(published), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == [] and found["counts"] == [2, 2]


def test_public_names_exist():
    assert ovref_inference.__all__ == sorted(ovref_inference.__all__)
    assert all(hasattr(ovref_inference, name) for name in ovref_inference.__all__)


@pytest.mark.parametrize("room", ["collection", "encoders", "proposers", "segmenters"])
def test_what_a_room_exports_is_there(room):
    package = importlib.import_module(f"ovref_inference.{room}")
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError):
        _ = package.nothing


@pytest.mark.slow
def test_a_fresh_light_installation_opens_and_answers(published, tmp_path):
    """pip installs the core with faiss alone into an empty environment, which then queries.

    Needs a package index, or the wheels in pip's cache or in $PIP_FIND_LINKS.
    """
    # From a copy, because a build leaves its folders in the source tree.
    source = tmp_path / "source"
    for name in ("ovref", "inference", "pipelines"):
        leave = shutil.ignore_patterns("__pycache__", "ovref_miniature")
        shutil.copytree(REPOSITORY / name, source / name, ignore=leave)
    for path in REPOSITORY.iterdir():
        if path.suffix in (".toml", ".md") or path.name in ("LICENSE", "NOTICE"):
            shutil.copy(path, source)
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    build = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("ovref-*.whl")
    assert wheel.stat().st_size < 1_000_000
    install = [python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"]
    constraints = REPOSITORY / "constraints.txt"
    done = subprocess.run([*install, "-c", constraints], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    packages = {item["name"].lower() for item in json.loads(listed.stdout)}
    light = {"ovref", "numpy", "pyarrow", "fsspec", "faiss-cpu", "packaging", "pip", "setuptools"}
    assert packages <= light
    done = subprocess.run(
        [python, "-c", QUERY, str(published), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == [2, 2]
