"""What a worker costs beside its models: CPU time of its threads, in milliseconds an image.

Images are generated and encoded already (random smooth heatmaps, an image as noisy as a photograph,
features from memory), so what is left is masks, JPEG, decoding, pooling and writing. The busiest
thread bounds the images a second of a worker that has enough cores. The CPU time of a thread can be
measured on a loaded machine. Linux only.

    python tests/benchmarks/worker_threads.py [--size 512] [--batch 16] [--turns 3]
"""

import argparse
import os
import statistics
import threading

import numpy as np
import torch

from bench import measure
from ovref.ops.binarisation import resized
from ovref.stages.embed import Embed, EmbedStage
from ovref.stages.synthesize import Synthesize, SynthesizeStage
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import VisualEncoder
from ovref_inference.pixels import Pixels

PATCH = 16


class Texts:
    """Embeddings that are there already."""

    dim = 768

    def encode(self, texts):
        return np.full((len(texts), self.dim), self.dim**-0.5, np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    turns = [worker(arguments.size, arguments.batch) for _ in range(arguments.turns)]
    names = ("busiest thread", "the caller's thread", "all threads")
    for name, values in zip(names, zip(*turns, strict=True), strict=True):
        print(f"{name}: {statistics.median(values):.1f} ms an image")


def worker(size, batch_size):
    """Milliseconds an image of the busiest thread, of the one that writes, and of all together."""
    size_hw = (size, size)
    image_hwc = photograph(size_hw)
    maps = measure.smooth_heatmaps(batch_size, size_hw)
    prompts = measure._prompts(3 * batch_size)
    spec = Synthesize(
        model="made", size_hw=size_hw, batch_size=batch_size, min_area=0.0, max_area=1.0
    )
    generate = SynthesizeStage(spec, measure._Generated(image_hwc, maps))
    tokens = torch.rand(batch_size, (size // PATCH) ** 2, 1024)
    visual = VisualEncoder(
        forward=lambda pixels: tokens[: len(pixels)],
        dim=1024,
        size_hw=size_hw,
        patch_size=PATCH,
        images=Pixels((0.5,) * 3, (0.2,) * 3, "bicubic", torch.device("cpu"), torch.float32),
        batch_size=batch_size,
    )
    settings = Embed(
        visual=VisualEncoderConfig(model="made"),
        text=TextEncoderConfig(model="made"),
        batch_size=batch_size,
    )
    before, latest, done = ticks(), {}, threading.Event()

    def watch():  # threads that have ended are no longer listed
        while not done.wait(0.02):
            latest.update(ticks())

    watcher = threading.Thread(target=watch)
    watcher.start()
    measure._whole(generate, EmbedStage(settings, visual, Texts()), prompts)
    latest.update(ticks())
    done.set()
    watcher.join()
    milliseconds = 1000 / os.sysconf("SC_CLK_TCK") / len(prompts)
    used = {thread: (latest[thread] - before.get(thread, 0)) * milliseconds for thread in latest}
    used.pop(watcher.native_id, None)
    return max(used.values()), used[threading.get_native_id()], sum(used.values())


def photograph(size_hw):
    """(H, W, 3) uint8: smooth colours with noise."""
    rng = np.random.default_rng(0)
    channels = [resized(rng.random((48, 48)), size_hw) for _ in range(3)]
    noisy = np.stack(channels, -1) * 255 + rng.normal(0, 6, (*size_hw, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def ticks():
    """CPU time of each of this process's threads so far, in clock ticks."""
    found = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        found[int(thread)] = int(fields[11]) + int(fields[12])
    return found


if __name__ == "__main__":
    main()
