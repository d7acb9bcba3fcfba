"""Run: pytest tests/benchmarks/test_attention.py"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "attention.py"


@pytest.fixture
def attention(monkeypatch):
    spec = importlib.util.spec_from_file_location("attention_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LAYERS", {"tiny": (4, 2, 8, 16), "small": (5, 2, 16, 16)})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return module


def run(attention, monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["attention.py", "--output", str(folder), "--repeats", "1"])
    attention.main()


def test_a_way_that_fails_is_only_reported(attention, monkeypatch, tmp_path, capsys):
    def failing(query, key, value, weights, tokens):
        if query.shape[3] == 16:
            raise RuntimeError("out of resource: shared memory\nand more")
        return attention.softmax(query, key, value, weights, tokens)

    monkeypatch.setattr(attention, "second_product", failing)
    with pytest.raises(SystemExit) as stopped:
        run(attention, monkeypatch, tmp_path)
    assert stopped.value.code == "some ways failed"
    assert "Traceback" in capsys.readouterr().err
    layers = json.loads((tmp_path / "attention.json").read_text())["layers"]
    others = {"softmax", "value columns", "log-sum-exp"}
    assert set(layers["tiny"]["added_ms"]) == {*others, "second product"}
    assert set(layers["small"]["added_ms"]) == others
    assert layers["small"]["failed"] == {
        "second product": "RuntimeError: out of resource: shared memory"
    }
    table = (tmp_path / "attention.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| small"))
    assert row.count("failed") == 1
    assert "- **small, second product failed**: RuntimeError: out of resource" in table


def test_nothing_fails_on_a_cpu(attention, monkeypatch, tmp_path):
    run(attention, monkeypatch, tmp_path)
    layers = json.loads((tmp_path / "attention.json").read_text())["layers"]
    for found in layers.values():
        assert found["failed"] == {}
        assert max(found["largest_difference"].values()) < 1e-5
        assert max(found["largest_difference_of_output"].values()) < 1e-5
    assert "failed" not in (tmp_path / "attention.md").read_text()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_is_the_softmax(attention, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    torch.manual_seed(0)
    query, key, value = (torch.randn(4, n, 3, 40).transpose(1, 2) for n in (37, 77, 77))
    tokens = torch.stack([torch.randperm(77)[:8] for _ in range(2)])
    weights = torch.zeros(2, 77, 8).scatter_(1, tokens[:, None], 0.5)
    with torch.no_grad():
        output, sums = attention.flex(query, key, value, weights, tokens)
        _, expected = attention.softmax(query, key, value, weights, tokens)
        expected_output, _ = attention.plain(query, key, value, weights, tokens)
    assert float((sums - expected).abs().max()) < 1e-5 < float(expected.max())
    assert float((output - expected_output).abs().max()) < 1e-5


def test_ways_of_our_own_are_measured_on_a_gpu_only(attention):
    def names(device, dtype):
        return list(attention.ways_on(torch.device(device), dtype))

    public = ["softmax", "second product", "value columns"]
    assert names("cpu", torch.float32) == [*public, "log-sum-exp"]
    assert names("cuda", torch.float32) == [*public, "flex"]
    kernels = [f"one kernel, {block}" for block in (32, 64, 128)]
    assert names("cuda", torch.bfloat16) == [*public, "log-sum-exp", "flex", *kernels]
