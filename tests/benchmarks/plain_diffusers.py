"""What diffusers' own documentation recommends for speed, on a call of the UNet, bare and recorded.

Its page "Accelerate inference" names fused attention (which PyTorch takes by default), fused
projections, channels-last memory, `torch.compile` and half precision; attention slicing saves
memory at the cost of time. Each is set beside the UNet as it comes, in turn; the median of CPU
times counts. Recorded means with attribution, which needs fused attention and so refuses slicing.

    python tests/benchmarks/plain_diffusers.py [--preset miniature] [--batch 8] [--repeats 15]
"""

import argparse
import contextlib
import copy
import json
import os
import platform
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0

from attribute_images import conditioning_of
from bench import presets
from bench.limits import alternately
from ovref.miniature.scenes import render
from ovref.models.attribution import noun_weights
from ovref.models.recorders.unet import recording
from ovref.models.tokens import token_positions


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--preset", choices=presets.SIZES_HW, default="miniature")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[], help="options left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = measure(arguments)
    stem = f"plain_diffusers_{arguments.preset}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / f"{stem}.md").write_text(report(results))
    print(report(results))


def measure(arguments):
    device = torch.device("cpu")
    torch.manual_seed(0)
    pipeline = presets.pipeline(arguments.preset, "ddim", torch.float32, device)
    unet = pipeline.unet
    size_hw = presets.SIZES_HW[arguments.preset]
    latent_hw = tuple(side // pipeline.vae_scale_factor for side in size_hw)
    scenes = [render(seed, "validation") for seed in range(arguments.batch)]
    captions = [scene.caption for scene in scenes]
    weights_bkn = noun_weights(
        [
            token_positions(pipeline.tokenizer, s.caption, [[(n.start, n.end)] for n in s.nouns])
            for s in scenes
        ],
        pipeline.tokenizer.model_max_length,
    )
    with torch.no_grad():
        conditioning = conditioning_of(pipeline, captions * 2, size_hw)  # two rows a caption
    latents, timestep = torch.randn(2 * arguments.batch, 4, *latent_hw), torch.tensor(500)

    @contextlib.contextmanager
    def slicing():
        unet.set_attention_slice("auto")
        yield
        unet.set_attention_slice(None)  # fused attention again

    self_attentions = [m for name, m in unet.named_modules() if name.endswith("attn1")]

    @contextlib.contextmanager
    def fused():
        for module in self_attentions:
            module.set_processor(FusedAttnProcessor2_0())
        yield
        for module in self_attentions:
            module.set_processor(AttnProcessor2_0())

    def compiled():
        model = copy.deepcopy(unet)
        model.compile(fullgraph=True, dynamic=False)
        return model

    options = {
        "as it comes": (lambda: unet, contextlib.nullcontext),
        "attention slicing": (lambda: unet, slicing),
        "fused projections": (lambda: unet, fused),
        "channels last": (
            lambda: copy.deepcopy(unet).to(memory_format=torch.channels_last),
            contextlib.nullcontext,
        ),
        "compiled": (compiled, contextlib.nullcontext),
    }
    runs, inside, names = [], [], []
    for name, (make, context) in options.items():
        if name in arguments.without:
            continue
        model = make()
        for recorded in (False, True):
            if recorded and name == "attention slicing":
                continue
            names.append((name, recorded))
            runs.append(lambda m=model: m(latents, timestep, **conditioning, return_dict=False))
            inside.append(both(context, model, weights_bkn, latent_hw) if recorded else context)
    for module in self_attentions:
        module.fuse_projections()  # beside the three it is made of; `fused` has it used
    seconds = dict(zip(names, alternately(runs, arguments.repeats, device, inside), strict=True))
    plain = seconds["as it comes", False]
    return {
        "what": "what diffusers recommends for speed, on a call of the UNet",
        "preset": arguments.preset,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "clock": "CPU time of the process",
        "rows": {
            name: {
                "seconds": seconds[name, False],
                "times_faster": plain / seconds[name, False],
                "attribution_percent": 100 * (seconds[name, True] / seconds[name, False] - 1)
                if (name, True) in seconds
                else None,
            }
            for name, recorded in names
            if not recorded
        },
    }


def both(context, unet, weights_bkn, latent_hw):
    @contextlib.contextmanager
    def inside():
        with context(), recording(unet, weights_bkn, latent_hw):
            yield

    return inside


def report(results):
    lines = [
        f"# Plain diffusers, {results['preset']}",
        "",
        f"{results['what'].capitalize()}. {results['machine']}, {results['threads']} threads; "
        f"torch {results['torch']}, float32; {results['batch']} captions, guided; median of "
        f"{results['repeats']} runs in turn, {results['clock']}. Made by "
        "`tests/benchmarks/plain_diffusers.py`, whose first lines say what is compared.",
        "",
        "| | ms | faster | attribution |",
        "|---|---:|---:|---:|",
    ]
    for name, row in results["rows"].items():
        percent = row["attribution_percent"]
        shown = "refused" if percent is None else f"{percent:+.1f}%"
        lines.append(
            f"| {name} | {1000 * row['seconds']:.0f} | {row['times_faster']:.2f}x | {shown} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
