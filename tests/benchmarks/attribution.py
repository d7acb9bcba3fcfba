"""What attribution costs on top of generation, and how far it is from DAAM done the published way.

With the miniature, batches of different captions, with and without guidance:

- a call of the UNet, bare and recorded;
- a whole batch, from captions to images, by the bare pipeline and by `Generator`, whose time
  includes what is done once a batch (weights, exchanging processors, heatmaps, 8-bit images).

Each is run bare, recorded, recorded, bare, and so on while there is time. Every four runs give one
ratio, in which a machine that slowly gets faster or slower cancels out; the median of the ratios
counts, with a bootstrap interval of 95 %. CPU time and wall are both taken.

DAAM's own procedure (explicit softmax, one dictionary entry per layer, head and token, every map
upsampled and clamped by itself) generates the first batch one caption at a time. Figures are of the
miniature on a CPU and say nothing about real models on a GPU.

Beside that, what it costs in quality to read fewer layers or steps: mean IoU of binarised heatmaps
of real generated scenes, noised as in training, with their true masks.

    python tests/benchmarks/attribution.py [--seconds 25] [--only overhead]
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from attribute_images import attribute_images, conditioning_of
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, STUFF
from ovref.models.attribution import FACTORS, noun_weights
from ovref.models.diffusion import Generator
from ovref.models.loading import load_pipeline
from ovref.models.recorders.unet import is_recorded, recording
from ovref.models.schedulers import make_scheduler
from ovref.models.tokens import token_positions
from ovref.ops.binarisation import BinariseRule, binarise, min_max_scaled
from ovref.records import YES
from ovref.stages.synthesize import Synthesize

MODEL = "miniature:stable_diffusion"
SIZE_HW = (64, 64)


GUIDANCE = {"guided": 4.0, "unguided": 1.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=25.0, help="for each ratio")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument(
        "--only", choices=("overhead", "quality"), help="the rest is kept from the recorded file"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output / "attribution.json"

    pipeline = load_pipeline(MODEL, revision=None, scheduler="ddim", dtype="float32", device="cpu")
    results = json.loads(path.read_text()) if arguments.only else {}
    results |= {
        "what": "attribution over bare generation, and against DAAM done the published way",
        "model": f"{MODEL} (the miniature: no figure here is one of a real model)",
    }
    if arguments.only != "quality":
        results |= {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used, the other idle",
            "torch": torch.__version__,
            "steps": arguments.steps,
            "seconds_a_ratio": arguments.seconds,
            "overhead": [
                overhead(pipeline, name, batch, arguments)
                for batch in arguments.batches
                for name in GUIDANCE
            ],
            "published": {
                name: published(pipeline, name, arguments.batches[0], arguments.steps)
                for name in GUIDANCE
            },
        }
    if arguments.only != "overhead":
        results["fewer_layers_and_steps"] = fewer(pipeline, arguments.scenes)
        results["numbers_read_back_a_step"] = {
            name: read_backs(pipeline, name)
            for name in ("ddim", "dpm_solver++", "unipc", "euler", "lcm")
        }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))


class Work:
    """A batch of captions of scenes, generated bare, with attribution, or by the published DAAM."""

    def __init__(self, pipeline, name, batch, steps):
        self.pipeline, self.guidance, self.steps = pipeline, GUIDANCE[name], steps
        self.generator = Generator(
            pipeline,
            Synthesize(model="given", steps=steps, guidance=self.guidance, size_hw=SIZE_HW),
        )  # all layers: configs/miniature.yaml reads those of 16 x 16 alone, which costs less
        scenes = [render(seed, "validation") for seed in range(batch)]
        self.captions = [scene.caption for scene in scenes]
        self.positions = [
            self.generator.positions(s.caption, [[(n.start, n.end)] for n in s.nouns])
            for s in scenes
        ]
        self.seeds = list(range(batch))

    def bare(self, part=slice(None)):
        return self.pipeline(
            self.captions[part], num_inference_steps=self.steps, guidance_scale=self.guidance,
            output_type="np",
            generator=[torch.Generator().manual_seed(s) for s in self.seeds[part]],
        ).images  # fmt: skip

    def attributed(self):
        return self.generator.generate(self.captions, self.positions, self.seeds)

    def published(self):
        maps = []
        for b, nouns in enumerate(self.positions):
            with Daam(self.pipeline.unet, guided=self.guidance > 1) as daam:
                self.bare(slice(b, b + 1))
            maps.append(daam.heatmaps_nhw(nouns, (16, 16)))
        return maps


def overhead(pipeline, name, batch, arguments):
    """Ratios of recorded to bare, of a call of the UNet and of a whole batch."""
    work = Work(pipeline, name, batch, arguments.steps)
    twice = 2 if work.guidance > 1 else 1
    weights_bkn = noun_weights(work.positions, pipeline.tokenizer.model_max_length)
    torch.manual_seed(0)
    latents, timestep = torch.randn(twice * batch, 4, 16, 16), torch.tensor(500)
    with torch.no_grad():
        conditioning = conditioning_of(pipeline, work.captions * twice, SIZE_HW)

    def unet():
        with torch.no_grad():
            pipeline.unet(latents, timestep, **conditioning, return_dict=False)

    def recorder():
        return recording(pipeline.unet, weights_bkn, (16, 16))

    found = {
        "batch": batch,
        "guidance": name,
        "nouns": sum(len(nouns) for nouns in work.positions),
        "unet_call": compared([(unet, contextlib.nullcontext), (unet, recorder)], arguments),
        "whole_batch": compared(
            [(work.bare, contextlib.nullcontext), (work.attributed, contextlib.nullcontext)],
            arguments,
        ),
    }
    print(json.dumps(found), flush=True)
    return found


def compared(runs, arguments):
    """Percent that the second run takes longer than the first; contexts do not count."""
    times = {"cpu": ([], []), "wall": ([], [])}

    def one(which):
        run, context = runs[which]
        with context():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times["cpu"][which].append(time.process_time() - cpu)
            times["wall"][which].append(time.perf_counter() - wall)

    for run, context in runs:
        with context():
            run()
    gc.collect()
    gc.disable()
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end or len(times["cpu"][0]) < 6:
        for which in (0, 1, 1, 0):
            one(which)
    gc.enable()
    found = {"quadruples": len(times["cpu"][0]) // 2}
    for clock, pairs in times.items():
        bare, recorded = (np.array(t).reshape(-1, 2).sum(1) for t in pairs)
        percent = 100 * (recorded / bare - 1)
        rng = np.random.default_rng(0)
        medians = np.median(rng.choice(percent, (5000, len(percent))), axis=1)
        found[clock] = {
            "seconds_bare": round(float(np.median(pairs[0])), 5),
            "percent_median": round(float(np.median(percent)), 2),
            "percent_interval": [round(float(q), 2) for q in np.quantile(medians, (0.025, 0.975))],
            "percent_of_best": round(100 * (min(pairs[1]) / min(pairs[0]) - 1), 2),
        }
    return found


def published(pipeline, name, batch, steps):
    """DAAM's own procedure, one caption at a time, beside ours."""
    work, times = Work(pipeline, name, batch, steps), {"published": [], "ours": []}
    for _ in range(3):
        daam = timed(times["published"], work.published)
        generated = timed(times["ours"], work.attributed)
    deviations = [
        np.abs(minmax(ours) - minmax(theirs))
        for one, maps in zip(generated, daam, strict=True)
        for ours, theirs in zip(one.heatmaps_nhw, maps, strict=True)
    ]
    return {
        "nouns": len(deviations),
        "seconds_published_one_at_a_time": round(min(times["published"]), 3),
        "seconds_ours": round(min(times["ours"]), 3),
        "times_faster_than_published": round(min(times["published"]) / min(times["ours"]), 2),
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
                min_max_scaled(maps[: len(scene.nouns)]), scene.label_hw.shape, BinariseRule()
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
    before = pipeline.scheduler
    pipeline.scheduler = make_scheduler(scheduler, before.config)
    counts = []
    for steps in (3, 5):
        settings = Synthesize(model="given", steps=steps, guidance=4.0, size_hw=SIZE_HW)
        generator = Generator(pipeline, settings)
        with ReadsBack() as watch:
            generator.generate(["a tree"], [[(2,)]], [0])
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
        f"{results['torch']}; {results['steps']} DDIM steps. Overhead in percent: the median of "
        "ratios of four runs in turn, its 95 % interval, CPU time of the process; in brackets by "
        "the wall. Made by `tests/benchmarks/attribution.py`, whose first lines say how.",
        "",
        "| batch | | UNet call, ms | of a UNet call | batch, s | of a whole batch | ratios |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["overhead"]:
        call, whole = row["unet_call"], row["whole_batch"]
        lines.append(
            f"| {row['batch']} | {row['guidance']} | {1000 * call['cpu']['seconds_bare']:.0f} | "
            f"{percent(call)} | {whole['cpu']['seconds_bare']:.2f} | {percent(whole)} | "
            f"{call['quadruples']}, {whole['quadruples']} |"
        )
    lines += ["", "Against DAAM the published way:", "", "| | guided | unguided |", "|---|---|---|"]
    for field in results["published"]["guided"]:
        guided, unguided = (results["published"][name][field] for name in GUIDANCE)
        lines.append(f"| {field.replace('_', ' ')} | {guided} | {unguided} |")
    lines += ["", "IoU of binarised heatmaps with true masks, fewer layers and steps:", ""]
    lines += ["| | things | stuff |", "|---|---:|---:|"]
    for name, iou in results["fewer_layers_and_steps"].items():
        lines.append(f"| {name} | {iou['things']:.3f} | {iou['stuff']:.3f} |")
    lines += ["", "Numbers read back from the device in a step, all of them by the scheduler:", ""]
    lines += [f"- {name}: {n:g}" for name, n in results["numbers_read_back_a_step"].items()]
    return "\n".join(lines) + "\n"


def percent(found):
    low, high = found["cpu"]["percent_interval"]
    return (
        f"{found['cpu']['percent_median']:+.1f} ({low:+.1f} to {high:+.1f}; "
        f"{found['wall']['percent_median']:+.1f})"
    )


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
