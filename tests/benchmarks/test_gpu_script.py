"""Run: pytest tests/benchmarks/test_gpu_script.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu.sh"

FILES = {
    "attention": ["attention_bfloat16/attention", "attention_float32/attention"],
    "presets": ["sd15", "sd21", "sdxl", "sd21_float32"],
    "compiled": [
        "sd21_channels_last", "sd21_fused", "sd21_compiled", "sd21_graphs", "sd21_all", "sd15_all",
        "sdxl_all",
    ],
    "schedulers": ["sd21_fast", "sd21_schedulers"],
    "backbones": ["backbones", "backbones_float32"],
    "opencut": ["opencut/opencut"],
}  # fmt: skip
"""Part -> what it leaves, a JSON and a table each."""


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
    [part if part == "opencut" else pytest.param(part, marks=pytest.mark.slow) for part in FILES],
)
def test_every_part_runs_and_leaves_its_files(tmp_path, part):
    done = rehearse(tmp_path, part)
    assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    expected = [f"{name}.{kind}" for name in FILES[part] for kind in ("json", "md")]
    assert found == sorted(expected)
    for name in FILES[part]:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        for row in result.get("rows", []):
            assert "error" not in row
        assert (tmp_path / f"{name}.md").read_text().startswith("# ")


def test_all_parts_are_known():
    """The parts that run by default are the ones tested here."""
    (line,) = [x for x in SCRIPT.read_text().splitlines() if "PARTS=(" in x and "gt 0" in x]
    assert line.partition("PARTS=(")[2].rstrip(")").split() == list(FILES)
