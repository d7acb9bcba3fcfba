"""Ways to read the attention that nouns' tokens get, on full-size layers of Stable Diffusion.

One transformer block of each kind is built in full size with random weights and run as it is, which
is 100 %. Beside it stands what each way adds to it, for the captions of the batch (the second half
of the rows, as under guidance):

- `softmax`: all probabilities written out in float32, then one product with the nouns' weights
  (what was done at first);
- `second product`: a second fused attention whose values are the nouns' weights (done on a GPU);
- `value columns`: the weights as more columns of the values in the one attention of all rows, which
  needs wider queries and keys, filled with zeros, and copies of them;
- `log-sum-exp`: the fused kernel also returns the denominators; exp(q k - log denominator) for the
  nouns' tokens alone (done on a CPU). On a GPU by the flash kernel's own operator, in half
  precision only;
- `flex`: the same with the denominators of PyTorch's public `flex_attention`, on a GPU only;
- `one kernel, B`: the kernel of `attention_kernel.py` with B positions a program, on a GPU in half
  precision only (in float32 it spills registers).

All are compared with the first: the largest difference is printed with the results. A way that
fails is reported, costs itself alone and makes the exit status 1, except where it leaves the GPU
unusable: then it is the first in the list of those that failed.

    python tests/benchmarks/attention.py [--device cpu] [--dtype float32] [--captions 1]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from functools import cache, partial
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch.nn import functional

KEYS, NOUNS, TOKENS = 77, 8, 8
BLOCKS = (32, 64, 128)
QUEUED = 10
LAYERS = {
    # name: height = width, heads, channels of a head, width of the text
    "sd15, 64 x 64": (64, 8, 40, 768),
    "sd15, 32 x 32": (32, 8, 80, 768),
    "sd21, 64 x 64": (64, 5, 64, 1024),
    "sdxl, 64 x 64": (64, 10, 64, 2048),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    machine = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name()
    results = {
        "what": "what each way to read attention adds to a full-size transformer block",
        "machine": f"{machine}, {os.cpu_count()} cores, 1 used, shared with other work",
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "captions": arguments.captions,
        "clock": "CPU time of the process" if device.type == "cpu" else "wall",
        "layers": {},
    }
    for name, shape in LAYERS.items():
        with torch.no_grad():
            results["layers"][name] = measure(shape, arguments, device)
        print(name, json.dumps(results["layers"][name]), flush=True)
    stem = "attention" if device.type == "cpu" else f"attention_{device.type}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / f"{stem}.md").write_text(report(results))
    if any(found["failed"] for found in results["layers"].values()):
        sys.exit("some ways failed")


def measure(shape, arguments, device):
    side, heads, depth, text_width = shape
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    captions, positions, width = arguments.captions, side * side, heads * depth
    block = BasicTransformerBlock(width, heads, depth, cross_attention_dim=text_width)
    block = block.to(device, dtype).eval()
    hidden = torch.randn(2 * captions, positions, width, device=device, dtype=dtype)
    text = torch.randn(2 * captions, KEYS, text_width, device=device, dtype=dtype)

    def heads_of(length):
        flat = torch.randn(2 * captions, length, heads, depth, device=device, dtype=dtype)
        return flat.transpose(1, 2)  # as a projection leaves it

    query, key, value = heads_of(positions), heads_of(KEYS), heads_of(KEYS)
    tokens = torch.stack([torch.randperm(KEYS)[:TOKENS] for _ in range(captions)]).to(device)
    weights = torch.zeros(captions, KEYS, NOUNS, device=device)
    weights[torch.arange(captions, device=device)[:, None], tokens, torch.arange(TOKENS)] = 1.0
    given = (query, key, value, weights, tokens)

    plain_output, sums = plain(*given)[0], softmax(*given)[1]
    ways, failed, differences, output_differences = {}, {}, {}, {}
    for name, way in ways_on(device, dtype).items():
        try:
            found = way(*given)
            differences[name] = float((found[1] - sums).abs().max())
            output_differences[name] = float((found[0] - plain_output).abs().max())
            ways[name] = way
        except Exception as error:  # of any kind: the other ways are measured all the same
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    runs = {
        "block": lambda: block(hidden, encoder_hidden_states=text),
        "plain": lambda: plain(*given),
    }
    runs |= {name: lambda way=way: way(*given) for name, way in ways.items()}
    seconds = alternately(runs, arguments.repeats, device)
    return {
        "block_ms": 1000 * seconds["block"],
        "attention_ms": 1000 * seconds["plain"],
        "added_ms": {name: 1000 * (seconds[name] - seconds["plain"]) for name in ways},
        "added_percent_of_block": {
            name: 100 * (seconds[name] - seconds["plain"]) / seconds["block"] for name in ways
        },
        "largest_difference": differences,
        "largest_difference_of_output": output_differences,
        "output_bits_unchanged": {name: found == 0 for name, found in output_differences.items()},
        "failed": failed,
    }


def ways_on(device, dtype):
    ways = {"softmax": softmax, "second product": second_product, "value columns": value_columns}
    if device.type == "cpu" or dtype != torch.float32:
        ways["log-sum-exp"] = log_sum_exp
    if device.type == "cuda":
        ways["flex"] = flex
    if device.type == "cuda" and dtype != torch.float32:
        ways |= {f"one kernel, {block}": partial(one_kernel, block=block) for block in BLOCKS}
    return ways


def plain(query, key, value, weights, tokens):
    return functional.scaled_dot_product_attention(query, key, value), None


def softmax(query, key, value, weights, tokens):
    first, heads, depth = len(query) // 2, query.shape[1], query.shape[3]
    scaled = key[first:].float() * depth**-0.5
    shares = torch.softmax(scaled @ query[first:].float().mT, dim=-2)
    sums = torch.bmm(weights.mT.repeat(1, 1, heads), shares.flatten(1, 2))
    return functional.scaled_dot_product_attention(query, key, value), sums


def second_product(query, key, value, weights, tokens):
    first, heads, depth = len(query) // 2, query.shape[1], query.shape[3]
    padded = functional.pad(weights, (0, depth - NOUNS)).to(query.dtype)
    padded = padded[:, None].expand(-1, heads, -1, -1)
    shares = functional.scaled_dot_product_attention(query[first:], key[first:], padded)
    sums = shares[..., :NOUNS].sum(1, dtype=torch.float32).mT
    return functional.scaled_dot_product_attention(query, key, value), sums


def value_columns(query, key, value, weights, tokens):
    first, heads, depth = len(query) // 2, query.shape[1], query.shape[3]
    columns = functional.pad(weights, (0, 0, 0, 0, first, 0)).to(query.dtype)
    columns = columns[:, None].expand(-1, heads, -1, -1)
    output = functional.scaled_dot_product_attention(
        functional.pad(query, (0, NOUNS)),
        functional.pad(key, (0, NOUNS)),
        torch.cat([value, columns], -1),
        scale=depth**-0.5,
    )
    sums = output[first:, ..., depth:].sum(1, dtype=torch.float32).mT
    return output[..., :depth], sums


def log_sum_exp(query, key, value, weights, tokens):
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    output, log_sums, *_ = kernel(query, key, value)
    return output, sums_from(log_sums, query, key, weights, tokens)


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query, key, value, weights, tokens):
    from torch.nn.attention.flex_attention import AuxRequest

    output, aux = compiled_flex()(query, key, value, return_aux=AuxRequest(lse=True))
    return output, sums_from(aux.lse, query, key, weights, tokens)


def one_kernel(query, key, value, weights, tokens, block):
    from attention_kernel import attend_and_add  # here, where a failure costs itself alone

    sums = weights.new_zeros(len(weights), NOUNS, query.shape[2])
    return attend_and_add(query, key, value, weights, sums, block), sums


def sums_from(log_sums, query, key, weights, tokens):
    """The nouns' sums, given the logarithms of the softmaxes' denominators, (rows, heads, p)."""
    first, heads, depth = len(query) // 2, query.shape[1], query.shape[3]
    places = tokens[:, None, :, None].expand(-1, heads, -1, depth)
    scores = torch.baddbmm(
        log_sums[first:].flatten(0, 1)[:, None].float(),
        key[first:].gather(2, places).flatten(0, 1).float(),
        query[first:].flatten(0, 1).float().mT,
        beta=-1,
        alpha=depth**-0.5,
    )
    chosen = weights.gather(1, tokens[:, :, None].expand(-1, -1, NOUNS)).mT
    shares = scores.exp_().view(first, -1, query.shape[2])
    return torch.bmm(chosen.repeat(1, 1, heads), shares)


def alternately(runs, repeats, device):
    """Median seconds of each, run in turn; on a GPU `QUEUED` times between two waits for it."""
    queued = 1 if device.type == "cpu" else QUEUED

    def clock():
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    times = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first warms up
        for name, run in runs.items():
            started = clock()
            for _ in range(queued):
                run()
            if repeat:
                times[name].append((clock() - started) / queued)
    return {name: statistics.median(found) for name, found in times.items()}


def report(results):
    layers = results["layers"].values()
    ways = list(dict.fromkeys(way for x in layers for way in (*x["added_ms"], *x["failed"])))
    lines = [
        "# Reading attention",
        "",
        f"{results['what'].capitalize()}, in percent of the block's time. {results['machine']}; "
        f"torch {results['torch']}, {results['dtype']}; {results['captions']} captions, guided; "
        f"{results['clock']}. Made by `tests/benchmarks/attention.py`, whose first lines say what "
        "the ways are.",
        "",
        f"| block | ms | its cross-attention, ms | {' | '.join(ways)} |",
        f"|---|{'---:|' * (2 + len(ways))}",
    ]
    for name, found in results["layers"].items():
        added = [
            f"{found['added_percent_of_block'][way]:+.2f}%"
            if way in found["added_percent_of_block"]
            else "failed"
            for way in ways
        ]
        lines.append(
            f"| {name} | {found['block_ms']:.1f} | {found['attention_ms']:.2f} | "
            f"{' | '.join(added)} |"
        )
    worst, worst_output = (
        max(max(found[of].values()) for found in layers)
        for of in ("largest_difference", "largest_difference_of_output")
    )
    changed = sorted(
        {
            way
            for found in layers
            for way, same in found["output_bits_unchanged"].items()
            if not same
        }
    )
    lines += ["", f"Largest difference from `softmax`: {worst:.1e} (a sum over heads)."]
    lines += [f"Ways that change the output's last bits: {', '.join(changed) or 'none'}."]
    if changed:
        lines[-1] += f" Largest difference of the output: {worst_output:.1e}."
    lines += [
        f"- **{name}, {way} failed**: {error}"
        for name, found in results["layers"].items()
        for way, error in found["failed"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
