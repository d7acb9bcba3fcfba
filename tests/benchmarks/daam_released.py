"""Draws with castorini/daam as released; run by daam_side_by_side.py and daam_full_size.py in an
environment of its own.

pip install daam==0.2.0        # pins diffusers 0.21.2 and transformers 4.30.2
"""

import argparse
import json
import time

import numpy as np
import torch
from daam import trace
from diffusers import DDIMScheduler, StableDiffusionPipeline

from memory import peak_bytes, reset_peak


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "orders",
        help="JSON: weights, threads, steps, guidance, output_type, captions, words, seeds, turns",
    )
    parser.add_argument("output", help="npz file")
    arguments = parser.parse_args()
    with open(arguments.orders, encoding="utf-8") as file:
        orders = json.load(file)
    torch.set_num_threads(orders["threads"])
    pipeline = StableDiffusionPipeline.from_pretrained(
        orders["weights"], safety_checker=None, requires_safety_checker=False, use_safetensors=True
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def bare(caption, seed):
        return pipeline(
            caption, num_inference_steps=orders["steps"], guidance_scale=orders["guidance"],
            generator=torch.Generator().manual_seed(seed), output_type=orders["output_type"],
        ).images[0]  # fmt: skip

    jobs = list(zip(orders["captions"], orders["words"], orders["seeds"], strict=True))
    images, maps, stored = [], [], []

    def daam(caption, words, seed):
        with torch.no_grad(), trace(pipeline) as tracer:
            images.append(bare(caption, seed))
            # By default it takes layers at 1, 2, 4, ... of 512 or 768 pixels; these are at others.
            factors = {key[0] for key, _ in tracer.all_heat_maps}
            found = tracer.compute_global_heat_map(factors=factors)
            maps.append([found.compute_word_heat_map(word).heatmap.numpy() for word in words])
            stored.append(sum(m.nbytes for _, m in tracer.all_heat_maps))

    if orders["warm"]:
        bare(*jobs[0][::2])
    found = {f"{kind}_{what}": [] for kind in orders["turns"] for what in ("cpu", "wall", "peak")}
    for kind in orders["turns"]:
        reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        for caption, words, seed in jobs:
            if kind == "daam":
                daam(caption, words, seed)
            else:
                bare(caption, seed)
        found[f"{kind}_cpu"].append(time.process_time() - cpu)
        found[f"{kind}_wall"].append(time.perf_counter() - wall)
        found[f"{kind}_peak"].append(peak_bytes())
    np.savez(
        arguments.output,
        images=np.stack([np.asarray(image) for image in images[: len(jobs)]]),
        maps=np.stack([word for words in maps[: len(jobs)] for word in words]),
        stored=max(stored),
        **found,
    )


if __name__ == "__main__":
    main()
