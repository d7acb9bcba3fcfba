"""What attribution costs in blocks of a diffusion transformer of real size, without any weights.

    python tests/benchmarks/transformer_attribution.py [--blocks 2] [--repeats 3] [--pixels 1024]

A stack of Stable Diffusion 3.5 medium's blocks (24 heads of 64 channels, 333 text tokens) runs
without attribution and with each reading of every block, in turns; the ratio is that of the medians
of CPU seconds. One thread. Writes a JSON record to the standard output.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext

import torch
from diffusers import SD3Transformer2DModel

from ovref.models.joint_attribution import JointAttribution, recording
from ovref.models.recorders.sd3 import SD3Recorder

POSITIONS = [[(5, 6), (17,), (40, 41, 42)]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        num_layers=options.blocks, attention_head_dim=64, num_attention_heads=24,
        caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    side = options.pixels // 16
    given = {
        "hidden_states": torch.randn(1, 16, 2 * side, 2 * side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 333, 4096),
        "pooled_projections": torch.randn(1, 2048),
    }
    seconds = {"without": [], "share": [], "output": []}
    kept = {}
    with torch.no_grad():
        network(**given)
        for _ in range(options.repeats):
            for reading, times in seconds.items():
                times.append(measured(network, given, side, reading, kept))
    medians = {reading: statistics.median(times) for reading, times in seconds.items()}
    print(json.dumps({
        "blocks": options.blocks, "pixels": options.pixels, "torch": torch.__version__,
        "cpu_seconds": {reading: round(value, 3) for reading, value in medians.items()},
        "overhead": {
            reading: round(medians[reading] / medians["without"] - 1, 4)
            for reading in ("share", "output")
        },
        "kept_bytes": kept,
    }, indent=1))  # fmt: skip


def measured(network, given, side, reading, kept):
    """CPU seconds of one call of the network."""
    context = nullcontext()
    if reading != "without":
        attribution = JointAttribution(POSITIONS, (side, side), SD3Recorder.layout, reading)
        attentions = [block.attn for block in network.transformer_blocks]
        context = recording(network, attentions, attribution, [True])
        tensors = [value for value in vars(attribution).values() if torch.is_tensor(value)]
        kept[reading] = sum(tensor.nbytes for tensor in tensors)
    start = time.process_time()
    with context:
        network(**given)
    return time.process_time() - start


if __name__ == "__main__":
    main()
