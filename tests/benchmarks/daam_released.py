"""Draws with castorini/daam as released; run by daam_side_by_side.py in an environment of its own.

pip install daam==0.2.0        # pins diffusers 0.21.2 and transformers 4.30.2
"""

import argparse
import json
import resource
import time

import numpy as np
import torch
from daam import trace
from diffusers import DDIMScheduler, StableDiffusionPipeline


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("orders", help="JSON: weights, steps, guidance, captions, words, seeds")
    parser.add_argument("output", help="npz file")
    arguments = parser.parse_args()
    with open(arguments.orders, encoding="utf-8") as file:
        orders = json.load(file)
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(
        orders["weights"], safety_checker=None, requires_safety_checker=False, use_safetensors=True
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def draw(caption, seed):
        return pipeline(
            caption, num_inference_steps=orders["steps"], guidance_scale=orders["guidance"],
            generator=torch.Generator().manual_seed(seed), output_type="np",
        ).images[0]  # fmt: skip

    jobs = list(zip(orders["captions"], orders["words"], orders["seeds"], strict=True))
    draw(*jobs[0][::2])
    images, maps, stored = [], [], 0
    started = time.process_time()
    for caption, words, seed in jobs:
        with torch.no_grad(), trace(pipeline) as tracer:
            images.append(draw(caption, seed))
            # By default it takes layers at 1, 2, 4, ... of 512 or 768 pixels; these are at others.
            factors = {key[0] for key, _ in tracer.all_heat_maps}
            found = tracer.compute_global_heat_map(factors=factors)
            maps += [found.compute_word_heat_map(word).heatmap.numpy() for word in words]
            stored = max(stored, sum(m.nbytes for _, m in tracer.all_heat_maps))
    seconds = time.process_time() - started
    started = time.process_time()
    for caption, _, seed in jobs:
        draw(caption, seed)
    bare = time.process_time() - started
    np.savez(
        arguments.output,
        images=np.stack(images),
        maps=np.stack(maps),
        seconds=seconds,
        bare_seconds=bare,
        stored_bytes=stored,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


if __name__ == "__main__":
    main()
