"""What attribution costs in blocks of a diffusion transformer of real size, without any weights.

    python tests/benchmarks/transformer_attribution.py [--blocks 2] [--repeats 3] [--pixels 1024]
        [--device cuda --dtype bfloat16 --rows 8] [--output FILE]

A stack of Stable Diffusion 3.5 medium's blocks (24 heads of 64 channels, 333 text tokens) runs
without attribution and with each reading of every block, in turns; the ratio is that of the medians
of seconds: of the CPU's, on one thread, or of the clock, the GPU waited for. What is read is also
compared with softmax and products written out in float32. On a GPU `share` is also read
by the second product that serves where no kernel returns its denominators: under a mask, and
compiled.
Writes a JSON record to the standard output.
"""

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch.nn import functional

from bench.limits import seconds as seconds_of
from ovref.models import joint_attribution
from ovref.models.joint_attribution import JointAttribution, recording
from ovref.models.loading import DTYPES
from ovref.models.recorders.sd3 import SD3Recorder

NOUNS = [(5, 6), (17,), (40, 41, 42)]
"""Positions of the tokens of each noun."""
SECOND = "share, second product"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1, help="captions, without guidance")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device(device):
        network = SD3Transformer2DModel(
            num_layers=options.blocks, attention_head_dim=64, num_attention_heads=24,
            caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
        ).eval().to(dtype)  # fmt: skip
        side, rows = options.pixels // 16, options.rows
        given = {
            "hidden_states": torch.randn(rows, 16, 2 * side, 2 * side, dtype=dtype),
            "timestep": torch.full((rows,), 500.0),
            "encoder_hidden_states": torch.randn(rows, 333, 4096, dtype=dtype),
            "pooled_projections": torch.randn(rows, 2048, dtype=dtype),
        }
    times = {"without": [], "share": [], "output": []}
    if device.type == "cuda":
        times[SECOND] = []
    kept, failed = {}, {}
    with torch.no_grad():
        for reading in list(times):
            try:
                timed(network, given, side, reading, kept)
            except RuntimeError as error:  # the other readings are worth having
                failed[reading] = str(error)
                del times[reading]
        for repeat in range(options.repeats + 1):
            for reading, found in times.items():
                measured = timed(network, given, side, reading, kept)
                if repeat:  # the first warms up
                    found.append(measured)
        gaps = {reading: gap(network, given, side, reading) for reading in list(times)[1:]}
        equal = same_bits(network, given, side)
    medians = {reading: statistics.median(found) for reading, found in times.items()}
    record = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "one CPU thread",
        "blocks": options.blocks, "pixels": options.pixels, "rows": options.rows,
        "dtype": options.dtype, "torch": torch.__version__,
        "seconds": {reading: round(value, 5) for reading, value in medians.items()},
        "overhead": {
            reading: round(medians[reading] / medians["without"] - 1, 4)
            for reading in list(times)[1:]
        },
        "kept_bytes": kept,
        "failed": failed,
        "bits of the output unchanged": equal,
        "largest gap of a heatmap, of its range": gaps,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def without_log_sums(query, key, value, mask, scale):
    """In place of `joint_attribution.attention_and_log_sums`."""
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output, None


def same_bits(network, given, side):
    """Whether the network's output with attribution is the one without, to the last bit."""
    plain = network(**given).sample
    attribution = attribution_of(given, side, "share")
    return torch.equal(plain, run(network, given, attribution).sample)


def attribution_of(given, side, reading):
    latents = given["hidden_states"]
    reading = "output" if reading == "output" else "share"
    positions = [NOUNS] * len(latents)
    return JointAttribution(
        positions, (side, side), SD3Recorder.layout, reading, device=latents.device
    )


def run(network, given, attribution, by_second=False):
    """One call of the network; with attribution in all of its blocks."""
    context = nullcontext()
    usual = joint_attribution.attention_and_log_sums
    if by_second:
        joint_attribution.attention_and_log_sums = without_log_sums
    if attribution is not None:
        attentions = [block.attn for block in network.transformer_blocks]
        context = recording(network, attentions, attribution, [True])
    try:
        with context:
            return network(**given)
    finally:
        joint_attribution.attention_and_log_sums = usual


def timed(network, given, side, reading, kept):
    """Seconds of one call of the network."""
    attribution = None
    if reading != "without":
        attribution = attribution_of(given, side, reading)
        tensors = [value for value in vars(attribution).values() if torch.is_tensor(value)]
        kept[reading] = sum(tensor.nbytes for tensor in tensors)
    return seconds_of(
        lambda: run(network, given, attribution, reading == SECOND), given["hidden_states"].device
    )


def gap(network, given, side, reading):
    """Largest difference of a heatmap from the one written out in float32, by its range."""
    attribution = attribution_of(given, side, reading)
    positions, sums, attend = side * side, [], attribution.attend

    def watched(query, key, value, *more, **options):
        output = attend(query, key, value, *more, **options)
        if reading != "output":
            found = torch.stack([shares(query[:, h], key[:, h]) for h in range(query.shape[1])])
            sums.append(found.mean(0))
        else:
            rows = output.transpose(1, 2).flatten(2).float()
            sums.append(rows[:, :positions] @ rows[:, positions:].mT)
        return output

    def shares(query, key):
        scores = query[:, :positions].float() @ key.float().mT / query.shape[-1] ** 0.5
        return scores.softmax(-1)[..., positions:]

    attribution.attend = watched
    run(network, given, attribution, reading == SECOND)
    every_bpk = torch.stack(sums).mean(0)
    wanted = torch.stack([every_bpk[..., list(noun)].mean(-1) for noun in NOUNS], 1)
    if reading == "output":
        wanted = wanted - wanted.amin(-1, keepdim=True)
    found = attribution.heatmaps_bnhw().flatten(2)
    spread = wanted.amax(-1) - wanted.amin(-1)
    return float(((found - wanted).abs().amax(-1) / spread).max())


if __name__ == "__main__":
    main()
