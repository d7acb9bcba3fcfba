"""What attribution costs on top of generation, and how far it is from DAAM done the published way.

Draws the same batch of different captions with the miniature, alternately bare, with attribution,
and one caption at a time by DAAM's own procedure (explicit softmax, one dictionary entry per layer,
head and token, every map upsampled and clamped by itself). Ratios are taken within one run,
repetition by repetition, on CPU time, so that other work on the machine moves them little. Figures
are of the miniature on a CPU and say nothing about real models on a GPU.

Beside that, what it costs in quality to read fewer layers or steps: mean IoU of binarised heatmaps
of real drawn scenes, noised as in training, with their true masks.

    python tests/benchmarks/attribution.py [--output tests/benchmarks/results] [--repeats 7]
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, STUFF
from ovref.models.attribution import FACTORS, is_recorded
from ovref.models.diffusion import SCHEDULERS, Generator, attribute_images, load_pipeline
from ovref.models.tokens import token_positions
from ovref.ops.heatmaps import BinariseRule, binarise, stretched
from ovref.records import YES

MODEL = "miniature:stable_diffusion"
SIZE_HW = (64, 64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scenes", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    pipeline = load_pipeline(MODEL, revision=None, scheduler="ddim", dtype="float32", device="cpu")
    results = {
        "what": "attribution over bare generation, and against DAAM done the published way",
        "model": f"{MODEL} (the miniature: no figure here is one of a real model)",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used, shared with other work",
        "torch": torch.__version__,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "clock": "CPU time of the process",
    }
    for guidance in (4.0, 1.0):
        name = "guided" if guidance > 1 else "unguided"
        results[name] = measure(pipeline, guidance, arguments)
        print(name, json.dumps(results[name], indent=1))
    results["fewer_layers_and_steps"] = fewer(pipeline, arguments.scenes)
    results["numbers_read_back_a_step"] = {
        name: read_backs(pipeline, name)
        for name in ("ddim", "dpm_solver++", "unipc", "euler", "lcm")
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "attribution.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "attribution.md").write_text(report(results))


def measure(pipeline, guidance, arguments):
    generator = Generator(
        pipeline, steps=arguments.steps, guidance=guidance, size_hw=SIZE_HW
    )  # all layers: configs/miniature.yaml reads those of 16 x 16 alone, which costs less
    scenes = [render(seed, "validation") for seed in range(arguments.batch)]
    captions = [scene.caption for scene in scenes]
    positions = [
        generator.positions(s.caption, [[(n.start, n.end)] for n in s.nouns]) for s in scenes
    ]
    seeds = list(range(arguments.batch))

    def bare(captions=captions, seeds=seeds):
        return pipeline(
            captions, num_inference_steps=arguments.steps, guidance_scale=guidance,
            output_type="np", generator=[torch.Generator().manual_seed(s) for s in seeds],
        ).images  # fmt: skip

    def attributed():
        return generator.draw(captions, positions, seeds)

    def published():
        maps = []
        for caption, nouns, seed in zip(captions, positions, seeds, strict=True):
            with Daam(pipeline.unet, guided=guidance > 1) as daam:
                bare([caption], [seed])
            maps.append(daam.heatmaps_nhw(nouns, (16, 16)))
        return maps

    bare(), attributed()
    times = {"bare": [], "attributed": [], "published": []}
    for repeat in range(arguments.repeats):
        drawn = timed(times["attributed"], attributed)
        timed(times["bare"], bare)
        if repeat < 2:
            daam = timed(times["published"], published)
    deviations = [
        np.abs(minmax(ours) - minmax(theirs))
        for drawing, maps in zip(drawn, daam, strict=True)
        for ours, theirs in zip(drawing.heatmaps_nhw, maps, strict=True)
    ]
    ratios = [a / b for a, b in zip(times["attributed"], times["bare"], strict=True)]
    return {
        "nouns": len(deviations),
        "seconds_bare": round(min(times["bare"]), 3),
        "seconds_attributed": round(min(times["attributed"]), 3),
        "seconds_published_daam_one_at_a_time": round(min(times["published"]), 3),
        "overhead_percent_median": round(100 * (statistics.median(ratios) - 1), 2),
        "overhead_percent_of_best_times": round(
            100 * (min(times["attributed"]) / min(times["bare"]) - 1), 2
        ),
        "times_faster_than_published": round(min(times["published"]) / min(times["attributed"]), 2),
        "largest_difference_after_minmax": float(f"{max(d.max() for d in deviations):.2g}"),
        "mean_difference_after_minmax": float(f"{np.mean([d.mean() for d in deviations]):.2g}"),
    }


def fewer(pipeline, count):
    """IoU with true masks: set of layers and of timesteps -> of things and of stuff."""
    scenes = [render(seed, "validation", plural_share=0) for seed in range(count)]
    images = np.stack([scene.image_hwc for scene in scenes])
    captions = [scene.caption for scene in scenes]
    positions = [
        token_positions(pipeline.tokenizer, s.caption, [[(n.start, n.end)] for n in s.nouns])
        for s in scenes
    ]
    sets = {
        "all layers, 6 timesteps": (FACTORS, (50, 100, 200, 300, 500, 700)),
        "16 x 16 layers, 6 timesteps": ((1,), (50, 100, 200, 300, 500, 700)),
        "8 x 8 layers, 6 timesteps": ((2,), (50, 100, 200, 300, 500, 700)),
        "16 x 16 layers, the 3 least noised": ((1,), (50, 100, 200)),
        "16 x 16 layers, the 3 most noised": ((1,), (300, 500, 700)),
        "16 x 16 layers, every second": ((1,), (50, 200, 500)),
        "16 x 16 layers, only 100": ((1,), (100,)),
    }
    found = {}
    for name, (factors, timesteps) in sets.items():
        heatmaps = attribute_images(
            pipeline, images, captions, positions, timesteps, seed=0, factors=factors
        )
        ious = {"things": [], "stuff": []}
        for scene, maps in zip(scenes, heatmaps, strict=True):
            masks = binarise(
                stretched(maps[: len(scene.nouns)]), scene.label_hw.shape, BinariseRule()
            )
            for noun, mask in zip(scene.nouns, masks == YES, strict=True):
                truth = scene.label_hw == CLASSES.index(noun.lemma)
                kind = "stuff" if noun.lemma in STUFF else "things"
                ious[kind].append((mask & truth).sum() / (mask | truth).sum())
        found[name] = {kind: round(float(np.mean(values)), 4) for kind, values in ious.items()}
    return found


class ReadsBack(TorchDispatchMode):
    """Counts numbers taken out of tensors: on a GPU each makes the host wait for it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def read_backs(pipeline, scheduler):
    """Numbers read back in each further step of the pipeline's loop with attribution."""
    name, options = SCHEDULERS[scheduler]
    before = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, name).from_config(before.config, **options)
    counts = []
    for steps in (3, 5):
        generator = Generator(pipeline, steps=steps, guidance=4.0, size_hw=SIZE_HW)
        with ReadsBack() as watch:
            generator.draw(["a tree"], [[(2,)]], [0])
        counts.append(watch.count)
    pipeline.scheduler = before
    return (counts[1] - counts[0]) / 2


def timed(times, function):
    start = time.process_time()
    result = function()
    times.append(time.process_time() - start)
    return result


def minmax(heatmap_hw):
    low, high = heatmap_hw.min(), heatmap_hw.max()
    return (heatmap_hw - low) / max(high - low, 1e-12)


def report(results):
    lines = [
        "# Attribution",
        "",
        f"{results['what'].capitalize()}. Model: {results['model']}. {results['machine']}; torch "
        f"{results['torch']}; batch of {results['batch']} different captions, {results['steps']} "
        f"DDIM steps, {results['repeats']} interleaved repeats, {results['clock']}. Made by "
        "`tests/benchmarks/attribution.py`.",
        "",
        "| | guided | unguided |",
        "|---|---|---|",
    ]
    for field in results["guided"]:
        guided, unguided = results["guided"][field], results["unguided"][field]
        lines.append(f"| {field.replace('_', ' ')} | {guided} | {unguided} |")
    lines += ["", "IoU of binarised heatmaps with true masks, fewer layers and steps:", ""]
    lines += ["| | things | stuff |", "|---|---:|---:|"]
    for name, iou in results["fewer_layers_and_steps"].items():
        lines.append(f"| {name} | {iou['things']:.3f} | {iou['stuff']:.3f} |")
    lines += ["", "Numbers read back from the device in a step, all of them by the scheduler:", ""]
    lines += [f"- {name}: {n:g}" for name, n in results["numbers_read_back_a_step"].items()]
    return "\n".join(lines) + "\n"


class Daam:
    """DAAM the published way, for one image: per layer, head and token, in Python."""

    def __init__(self, unet, guided):
        self.unet, self.guided, self.sums, self.steps = unet, guided, {}, {}

    def __enter__(self):
        self.before = dict(self.unet.attn_processors)
        own = {name: self.processor(name) for name in self.before if is_recorded(name)}
        self.unet.set_attn_processor({**self.before, **own})
        return self

    def __exit__(self, *error):
        self.unet.set_attn_processor(self.before)

    def processor(self, name):
        def attend(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            query = attn.head_to_batch_dim(attn.to_q(hidden_states))
            key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
            probabilities = attn.get_attention_scores(query, key)
            self.keep(name, probabilities.unflatten(0, (-1, attn.heads))[int(self.guided)])
            output = attn.batch_to_head_dim(probabilities @ value)
            return attn.to_out[1](attn.to_out[0](output))

        return attend

    def keep(self, name, probabilities_hpk):
        self.steps[name] = self.steps.get(name, 0) + 1
        for token in range(probabilities_hpk.shape[2]):
            for head in range(probabilities_hpk.shape[0]):
                entry = (name, head, token)
                column = probabilities_hpk[head, :, token].float()
                self.sums[entry] = self.sums[entry] + column if entry in self.sums else column

    def heatmaps_nhw(self, nouns, latent_hw):
        sides = {(latent_hw[0] // f) * (latent_hw[1] // f): latent_hw[0] // f for f in FACTORS}
        upsampled = {}
        for (name, _, token), summed in self.sums.items():
            side = sides[len(summed)]
            map_hw = functional.interpolate(
                summed.reshape(1, 1, side, side), latent_hw, mode="bicubic"
            )
            upsampled.setdefault(token, []).append(map_hw[0, 0].clamp(min=0) / self.steps[name])
        means = {token: torch.stack(maps).mean(0) for token, maps in upsampled.items()}
        words = [torch.stack([means[token] for token in noun]).mean(0) for noun in nouns]
        return torch.stack(words).numpy()


if __name__ == "__main__":
    main()
