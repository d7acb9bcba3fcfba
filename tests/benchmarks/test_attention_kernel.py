"""Run: pytest tests/benchmarks/test_attention_kernel.py

Triton interprets kernels on a CPU where TRITON_INTERPRET is set before it is imported, so this file
runs itself in another process. What else can be shown without a GPU: fake tensors go through the
operator in one graph, and the kernel compiles for cards that are not there.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (torch for CPUs)"
)

CASES = {
    # name: type, captions, guided, heads, depth, positions, nouns, block
    "sd15, finest": ("float32", 1, True, 8, 40, 64, 8, 32),
    "sd15, middle": ("float32", 1, True, 8, 80, 16, 8, 16),
    "sd15, coarsest": ("float32", 1, True, 8, 160, 16, 8, 16),
    "sd21": ("float32", 2, True, 5, 64, 64, 8, 32),
    "sdxl": ("float32", 1, True, 10, 64, 16, 16, 16),
    "odd number of positions": ("float32", 2, True, 3, 64, 37, 8, 16),
    "fewer positions than a block": ("float32", 2, True, 3, 40, 9, 8, 16),
    "unguided": ("float32", 2, False, 3, 64, 37, 8, 16),
    "one noun": ("float32", 2, True, 3, 64, 37, 1, 16),
    "many nouns": ("float32", 2, True, 3, 64, 37, 21, 16),
    "no noun": ("float32", 2, True, 3, 64, 37, 0, 16),
    "float16": ("float16", 2, True, 5, 40, 37, 8, 16),
    "bfloat16": ("bfloat16", 2, True, 5, 64, 37, 8, 16),
}
TOLERANCES = {"float32": 3e-6, "float16": 3e-3, "bfloat16": 2e-2}
"""Outputs and sums are up to 3, so these are a few units in the last place of each type."""


@pytest.fixture(scope="module")
def interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_output_and_sums_are_those_of_the_softmax(interpreted, name):
    found, tolerance = interpreted[name], TOLERANCES[CASES[name][0]]
    assert found["output"] < tolerance
    assert found["sums"] < tolerance
    assert found["empty_column"] == 0
    assert found["in_memory"] == "positions before heads"


def test_the_check_would_find_a_wrong_caption(interpreted):
    assert interpreted["sd21"]["sums_of_the_other_caption"] > 0.1


def test_what_cannot_be_loaded_16_bytes_at_a_time_is_refused(interpreted):
    assert "depth 36 and strides" in interpreted["refused"]


def test_one_graph_on_fake_tensors(tmp_path):
    """In another process: a compiler without a card warns that it cannot look into the kernel."""
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from attention_kernel import attend_and_add

def attended(*given):
    return attend_and_add(*given, 64) * 2

with FakeTensorMode():
    query, key, value = (
        torch.empty(4, n, 5, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for n in (4096, 77, 77)
    )
    weights, sums = (torch.empty(2, *shape, device="cuda") for shape in ((77, 8), (8, 4096)))
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(attended, backend=backend, fullgraph=True)
        output = compiled(query, key, value, weights, sums)
        print(output.device.type, output.dtype, *output.shape, *output.stride())
"""
    output = output_of(program, tmp_path)
    assert output == 2 * "cuda torch.bfloat16 4 5 4096 64 1310720 64 320 1\n"


def test_it_compiles_for_cards_and_stays_in_their_registers(tmp_path):
    program = """
import json
from attention_kernel import resources
print(json.dumps([resources(capability, "bf16", 64, 64) for capability in (80, 90)]))
"""
    for takes in json.loads(output_of(program, tmp_path)):
        assert takes["spilled"] == 0 and 32 < takes["registers"] <= 255
        assert 0 < takes["shared"] <= 163 * 1024


def output_of(program, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, cwd=HERE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(attention, attend_and_add, case):
    """Largest differences of one case from what `attention.softmax` and float32 attention give."""
    dtype, captions, guided, heads, depth, positions, nouns, block = case
    rows = captions * (1 + guided)
    query, key, value = (
        torch.randn(rows, length, heads, depth, dtype=getattr(torch, dtype)).transpose(1, 2)
        for length in (positions, attention.KEYS, attention.KEYS)
    )
    weights = torch.zeros(captions, attention.KEYS, nouns)
    for b in range(captions):
        for n in range(1, nouns):  # the first column stays empty, but where it is the only one
            weights[b, torch.randperm(attention.KEYS)[: 1 + n % 3], n] = 1 / (1 + n % 3)
        if nouns == 1:
            weights[b, [b, 76], 0] = 0.5
    sums = torch.full((captions, nouns, positions), 0.25)  # they are added to
    output = attend_and_add(query, key, value, weights, sums, block)
    sums -= 0.25
    wide = [x.float() for x in (query, key, value)]
    if not guided:  # `softmax` takes the second half of the rows
        _, expected = attention.softmax(*(torch.cat([x, x]) for x in wide), weights, None)
    else:
        _, expected = attention.softmax(*wide, weights, None)
    expected_output, _ = attention.plain(*wide, weights, None)
    return {
        "output": float((output.float() - expected_output).abs().max()),
        "sums": float((sums - expected).abs().amax() if nouns else 0),
        "empty_column": float(sums[:, 0].abs().max()) if nouns > 1 else 0.0,
        "sums_of_the_other_caption": float((sums - expected.flip(0)).abs().amax() if nouns else 0),
        "in_memory": "positions before heads"
        if output.transpose(1, 2).is_contiguous()
        else str(output.stride()),
    }


def main():
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    import attention
    from attention_kernel import attend_and_add

    multiply = InterpreterBuilder.create_dot

    def create_dot(self, *given):
        """The interpreter multiplies the bits of bfloat16 as if they were integers."""
        return multiply(self, *(widened(self, x) for x in given[:2]), *given[2:])

    def widened(builder, x):
        return builder.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x

    InterpreterBuilder.create_dot = create_dot
    torch.manual_seed(0)
    results = {name: check(attention, attend_and_add, case) for name, case in CASES.items()}
    try:
        check(attention, attend_and_add, ("float32", 1, True, 1, 36, 16, 1, 16))
    except ValueError as error:
        results["refused"] = str(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
