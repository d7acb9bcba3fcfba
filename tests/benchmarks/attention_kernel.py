"""One Triton kernel that yields the attention's output and the nouns' sums.

A program has a block of positions of one row and goes through all heads. All keys are in one block,
so each softmax is a plain one; its probabilities are multiplied by the values and, on the spot, by
the nouns' weights, whose sums over heads stay in registers until the end. No other program adds to
the same place, so there are no atomics and a result depends on no order.

    python tests/benchmarks/attention_kernel.py

compiles it for cards that need not be there and prints what it takes of them.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ALIGNED = 8
"""Depths and strides are multiples of this many elements, so that 16 bytes are loaded at once."""


@triton.jit
def _load(ptr, i, i_end, i_stride, j, j_end):
    """Elements (i, j) of a matrix whose rows are `i_stride` apart, 0 beyond the ends."""
    inside = (i[:, None] < i_end) & (j[None, :] < j_end)
    return tl.load(ptr + i[:, None] * i_stride + j[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, i, i_end, i_stride, j, j_end, value):
    inside = (i[:, None] < i_end) & (j[None, :] < j_end)
    tl.store(ptr + i[:, None] * i_stride + j[None, :], value, mask=inside)


@triton.jit
def _attend_and_add(
    query_ptr,
    key_ptr,
    value_ptr,
    weights_ptr,
    sums_ptr,
    output_ptr,
    query_row,
    query_head,
    query_position,
    key_row,
    key_head,
    key_position,
    value_row,
    value_head,
    value_position,
    heads,
    positions,
    keys,
    nouns,
    first,
    scale,
    depth: tl.constexpr,
    block: tl.constexpr,
    key_block: tl.constexpr,
    chunk: tl.constexpr,
    noun_block: tl.constexpr,
    aligned: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * block + tl.arange(0, block)
    k = tl.arange(0, key_block)
    n = tl.arange(0, noun_block)
    adding = tl.where(row >= first, nouns, 0)  # the unconditional rows add no noun
    of_weights = weights_ptr + (row - first) * keys * nouns
    weights = _load(of_weights, k, keys, nouns, n, adding).to(query_ptr.dtype.element_ty)
    sums = tl.zeros((block, noun_block), tl.float32)
    for head in range(heads):
        of_query = query_ptr + tl.multiple_of(row * query_row + head * query_head, aligned)
        of_key = key_ptr + tl.multiple_of(row * key_row + head * key_head, aligned)
        of_value = value_ptr + tl.multiple_of(row * value_row + head * value_head, aligned)
        of_output = output_ptr + tl.multiple_of((row * positions * heads + head) * depth, aligned)
        scores = tl.zeros((block, key_block), tl.float32)
        for start in tl.static_range(0, depth, chunk):
            d = start + tl.arange(0, chunk)
            query = _load(of_query, p, positions, query_position, d, depth)
            key = _load(of_key, k, keys, key_position, d, depth)
            scores = tl.dot(query, key.T, scores, input_precision="tf32x3")
        scores = tl.where(k[None, :] < keys, scores * scale, float("-inf"))
        exponentials = tl.exp2((scores - tl.max(scores, 1)[:, None]) * 1.4426950408889634)
        shares = exponentials * (1.0 / tl.sum(exponentials, 1))[:, None]
        shares = shares.to(weights.dtype)
        sums = tl.dot(shares, weights, sums, input_precision="tf32x3")
        for start in tl.static_range(0, depth, chunk):
            d = start + tl.arange(0, chunk)
            value = _load(of_value, k, keys, value_position, d, depth)
            output = tl.dot(shares, value, input_precision="tf32x3").to(weights.dtype)
            _store(of_output, p, positions, heads * depth, d, depth, output)
    of_sums = sums_ptr + (row - first) * nouns * positions
    sums = tl.trans(sums)
    sums += _load(of_sums, n, adding, positions, p, positions)
    _store(of_sums, n, adding, positions, p, positions, sums)


@triton_op("ovref_benchmarks::attend_and_add", mutates_args={"sums_bnp"})
def attend_and_add(
    query_bhpd: torch.Tensor,
    key_bhkd: torch.Tensor,
    value_bhkd: torch.Tensor,
    weights_bkn: torch.Tensor,
    sums_bnp: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """Attends, and adds the nouns' shares of all heads.

    Args:
        query_bhpd: (rows, heads, positions, d) float16, bfloat16 or float32, rows being the
            captions, or under guidance first the unconditional and then the conditional ones.
        key_bhkd: (rows, heads, keys, d), like the queries.
        value_bhkd: (rows, heads, keys, d), like the queries.
        weights_bkn: (captions, keys, nouns) float32, contiguous.
        sums_bnp: (captions, nouns, positions) float32, contiguous; is added to.
        block: positions of a program, a power of two of at least 16.

    Returns:
        The attention's output, (rows, heads, positions, d), of the queries' type; in memory
        positions come before heads, as what follows wants them.

    Raises:
        ValueError: a depth or stride that is not a multiple of `ALIGNED`, or sums or weights that
            are not contiguous.
    """
    rows, heads, positions, depth = query_bhpd.shape
    keys, nouns = weights_bkn.shape[1:]
    strides = [n for x in (query_bhpd, key_bhkd, value_bhkd) for n in x.stride()[:3]]
    if any(n % ALIGNED for n in (depth, *strides)):
        raise ValueError(f"depth {depth} and strides {strides} must be multiples of {ALIGNED}")
    if any(x.stride(3) != 1 for x in (query_bhpd, key_bhkd, value_bhkd)):
        raise ValueError("the channels of a head must lie side by side")
    if not (weights_bkn.is_contiguous() and sums_bnp.is_contiguous()):
        raise ValueError("weights and sums must be contiguous")
    output_bphd = query_bhpd.new_empty(rows, positions, heads, depth)
    wrap_triton(_attend_and_add)[(triton.cdiv(positions, block), rows)](
        query_bhpd, key_bhkd, value_bhkd, weights_bkn, sums_bnp, output_bphd,
        *strides,
        heads, positions, keys, nouns,
        rows - len(weights_bkn),
        depth**-0.5,
        **_sizes(depth, keys, nouns, block),
        **_launch(block),
    )  # fmt: skip
    return output_bphd.transpose(1, 2)


def _sizes(depth: int, keys: int, nouns: int, block: int) -> dict[str, int]:
    return {
        "depth": depth,
        "block": block,
        "key_block": triton.next_power_of_2(keys),
        "chunk": 16 if depth % 32 else 32,  # 160 channels at once would not fit
        "noun_block": max(16, triton.next_power_of_2(nouns)),
        "aligned": ALIGNED,
    }


def _launch(block: int) -> dict[str, int]:
    return {"num_warps": max(1, block // 16), "num_stages": 2}


def resources(capability: int, dtype: str, depth: int, block: int) -> dict[str, int]:
    """What a program takes of a card that need not be there: compiled, assembled, not run.

    Args:
        capability: 80 is an A100, 90 an H100.
        dtype: Triton's name, `bf16`, `fp16` or `fp32`.
        depth: channels of a head.
        block: positions of a program.

    Returns:
        Registers of a thread, bytes that spilled out of them, bytes of shared memory and threads
        of a program.
    """
    constants = _sizes(depth, 77, 8, block)
    signature = dict.fromkeys(_attend_and_add.arg_names, "i32") | dict.fromkeys(
        constants, "constexpr"
    )
    signature |= {"scale": "fp32", "weights_ptr": "*fp32", "sums_ptr": "*fp32"}
    signature |= {f"{x}_ptr": f"*{dtype}" for x in ("query", "key", "value", "output")}
    multiples = [
        name for name in signature if name.endswith(("_ptr", "_row", "_position", "positions"))
    ]
    places = [(_attend_and_add.arg_names.index(name),) for name in multiples]
    kernel = triton.compile(
        ASTSource(
            _attend_and_add,
            signature,
            constants,
            {place: [["tt.divisibility", 16]] for place in places},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=_launch(block),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        arch = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        output = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", source, "-o", f"{folder}/out"],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    return {
        "registers": int(re.search(r"Used (\d+) registers", output)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", output)[1]),
        "shared": kernel.metadata.shared,
        "threads": 32 * _launch(block)["num_warps"],
    }


def main() -> None:
    print("| card | type | depth | block | threads | registers | spilled, B | shared, KiB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for capability in (80, 90):
        for dtype, depths in (("bf16", (40, 64, 80, 160)), ("fp32", (40,))):
            for depth in depths:
                for block in (32, 64, 128) if dtype == "bf16" else (64,):
                    takes = resources(capability, dtype, depth, block)
                    print(
                        f"| sm_{capability} | {dtype} | {depth} | {block} | {takes['threads']} | "
                        f"{takes['registers']} | {takes['spilled']} | {takes['shared'] / 1024:g} |"
                    )


if __name__ == "__main__":
    main()
