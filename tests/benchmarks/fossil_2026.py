"""What an image of `fossil_2026` costs: operations of its parts, counted without values.

    python tests/benchmarks/fossil_2026.py

GPU-hours are not measured but derived: operations by the share of a card's ceiling at which
generation with joint attention ran on an H100 (results/gpu.md). Writes results/fossil_2026.md.
"""

import json
from pathlib import Path

import torch
import transformers

from bench.limits import count
from full_size_generators import GENERATORS
from machine import commit
from ovref.config import load
from ovref.known_models import random_weights, table
from ovref_pipelines.recipe import BuildConfig

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
CEILING, SHARE = 766e12, 0.35
"""Products of bfloat16 matrices on the H100 (results/gpu.md), and the share of them at which
Stable Diffusion 3.5 medium generated without attribution, not compiled, two captions at once."""
FOSSIL_TFLOP, FOSSIL_RATE = 83.0 + 1.0, 3.85
"""`fossil` on the same card: operations an image with its embedding, and images a second of a
whole compiled worker."""
TOKENS = 512
"""Tokens of a padded caption."""


PARTS = {
    "transformer": (
        "Joint attention (12 steps, half of them guided) instead of a UNet (20 guided steps): {}. "
        "The transformer's images are worse."
    ),
    "UNet, 4 steps without guidance": (
        "Four steps without guidance: {} with the UNet, {} with the transformer. Neither was "
        "distilled for them; what distilled weights keep cannot be seen there."
    ),
    "transformer, `output` of the last 3 blocks": (
        "The reading `output` of the last blocks, FLUX.2's default, instead of `share` of block 2: "
        "{}. Its heatmaps have an IoU of 26 / 29, 7 / 38 and 14 / 36 (things / stuff) in these "
        "blocks, those of `share` 49 / 80 ([miniature transformer](miniature_transformer.md)). "
        "ConceptAttention's figures are of models trained otherwise."
    ),
    "UNet, CLIP as backbone": (
        "One model for images and texts, the miniature's CLIP instead of DINOv2: {}. It is no "
        "TIPSv2, and too small for dense features: RetCLIP's PQ is 35 with them, 70 with crops."
    ),
    "transformer, with these three changes": "All together: {}.",
}
"""Row of compare_generators.py -> what it shows, with places for differences."""


def shown(rows):
    """Lines about the replaced parts, from the results of compare_generators.py."""

    def gain(name):
        value, low, high = (100 * number for number in rows[name]["difference"]["FOSSIL"])
        return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"

    unet = rows["UNet"]["seeds"]["FOSSIL"]
    few = "transformer, 4 steps without guidance"
    return [
        "FOSSIL's mIoU with the UNet and DINOv2 is "
        f"{100 * sum(unet) / len(unet):.1f}; differences have 95 % intervals of a paired bootstrap "
        "over scenes and seeds of k-means ([Generators](generators.md)).",
        "",
        *(f"- {text.format(gain(name), gain(few))}" for name, text in PARTS.items()),
        "",
        "So nothing on the miniature speaks for the replaced parts, and nothing there can: none of "
        "its models was trained for what its counterpart in `fossil_2026` is chosen for. What the "
        "parts do with the published weights has to be measured with those.",
    ]


def main():
    config = load(BuildConfig, ROOT / "configs/fossil_2026.yaml", ["corpus.path=none.txt"])
    made, (height, width) = config.synthesize, config.embed.visual.size_hw
    parts = GENERATORS[made.model]()
    rows, columns = (size // 16 for size in made.size_hw)
    tips = random_weights.settings_of(table.find(config.embed.visual.model))
    with torch.device("meta"), torch.no_grad():
        network, text, vae = parts.network(), parts.text_encoder(), parts.vae()
        backbone = transformers.Tipsv2VisionModel(tips.vision_config)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        places = [torch.zeros(1, n, 4) for n in (rows * columns, TOKENS)]
        states = torch.zeros(1, rows * columns, network.config.in_channels)
        embedded = torch.zeros(1, TOKENS, network.config.joint_attention_dim)
        latents = torch.zeros(1, vae.config.latent_channels, 2 * rows, 2 * columns)
        found = {
            f"network, {made.steps} steps of one row": made.steps * count(lambda: network(
                hidden_states=states, encoder_hidden_states=embedded, timestep=torch.ones(1),
                img_ids=places[0], txt_ids=places[1],
            )),
            f"text encoder, {TOKENS} tokens": count(lambda: text(ids)),
            "decoder": count(lambda: vae.decode(latents)),
            f"backbone, {height} x {width}": count(
                lambda: backbone(pixel_values=torch.zeros(1, 3, height, width))
            ),
        }  # fmt: skip
    total = sum(found.values())
    hours = 1e6 * total / (SHARE * CEILING) / 3600
    lines = [
        "# What `fossil_2026` costs",
        "",
        f"Operations an image of {made.size_hw[0]} x {made.size_hw[1]} pixels, counted by torch on "
        "the parts' real architectures without values; a multiplication and an addition count "
        f"each. `tests/benchmarks/fossil_2026.py` at {commit()}.",
        "",
        "| part | TFLOP |",
        "|---|---:|",
        *(f"| {name} | {flops / 1e12:.2f} |" for name, flops in found.items()),
        f"| in all | {total / 1e12:.2f} |",
        f"| `fossil` ([gpu.md](gpu.md)) | {FOSSIL_TFLOP:.1f} |",
        "",
        f"A million captions would take some {hours:.0f} hours of an H100 at {SHARE:.0%} of "
        f"{CEILING / 1e12:.0f} TFLOP/s, at which Stable Diffusion 3.5 medium generated there, and "
        f"{1e6 / FOSSIL_RATE / 3600:.0f} with `fossil` (measured, {FOSSIL_RATE} images a second of "
        "a compiled worker). The first figure is derived: FLUX.2-klein-4B has not run on a GPU "
        "here, and nouns, masks, JPEG and the reduction are not in it. The dry run of a build "
        "(`--dry-run`) measures all of it on the card at hand.",
        "",
        "## What the miniature shows of the replaced parts",
        "",
        *shown(json.loads((RESULTS / "generators.json").read_text())["rows"]),
    ]
    path = RESULTS / "fossil_2026.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
