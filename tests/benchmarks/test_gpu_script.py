"""Run: pytest tests/benchmarks/test_gpu_script.py"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu.sh"

FILES = {
    "warm": ["warm_all_16.log", "warm_compiled_32.log", "warm_fast.log", "warm_graphs_16.log"],
    "works": ["works.json"],
    "wait": [],
    "compiled": ["compiled.json"],
    "ways": ["all_16.json", "compiled_32.json", "graphs_16.json"],
    "fast": ["fast.json"],
    "joint": ["joint.json", "joint_blocks.json"],
    "sdxl": ["sdxl.json"],
    "generation": ["generation.json"],
    "daam": [],  # needs an environment of its own
    "backbones": ["backbones.json"],
    "opencut": ["opencut.json", "opencut.md"],
    "windows": ["segment_windows_cpu.json", "segment_windows_cpu.md"],
    "attention": ["attention.json", "attention.md"],
    "faiss": [],  # likewise
}
"""Part -> the files that it leaves, of the parts that run by default."""

QUICK = ("wait", "daam", "opencut", "faiss")


def rehearse(folder, *parts):
    environment = os.environ | {"REHEARSE": "1", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", SCRIPT, folder, *parts], env=environment, capture_output=True, text=True
    )


def test_a_part_that_does_not_exist_is_refused(tmp_path):
    done = rehearse(tmp_path, "presetz")
    assert done.returncode == 1 and "no part presetz" in done.stderr


@pytest.mark.parametrize(
    "part",
    [part if part in QUICK else pytest.param(part, marks=pytest.mark.slow) for part in FILES],
)
def test_every_part_runs_and_leaves_its_files(tmp_path, part):
    done = rehearse(tmp_path, part, *(["wait"] if part == "warm" else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == FILES[part]
    for path in tmp_path.glob("*.json"):
        assert "error" not in path.read_text(), path.read_text()
        assert json.loads(path.read_text())


def test_the_parts_that_run_by_default_are_those_tested_here():
    script = SCRIPT.read_text()
    assert re.search(r"PARTS=\((warm[^)]*)\)", script)[1].split() == list(FILES)
    for part in FILES:
        assert f"\n    {part})" in script, part
