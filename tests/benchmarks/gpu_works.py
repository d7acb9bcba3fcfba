"""Whether whole batches go through `synthesize` and `embed` on a GPU at full size, and rightly.

Stable Diffusion 2.1-base is written to a folder with random weights and loaded from there by the
stage itself, in each half precision. Queries and keys of cross-attention are scaled up, so that
attention is as uneven as in a trained model. For each precision:

- a batch goes through both stages twice: are all numbers finite, are the shards' bytes equal;
- the same batch is generated with hooks on `to_q` and `to_k` that write out the softmax of every
  recorded layer at every step in float32: how far are the heatmaps from these;
- `batch_size=auto`: what it chooses on this device;
- with less memory than the batch takes: is it halved, and are all images there.

    python tests/benchmarks/gpu_works.py --output OUT [--device cuda] [--preset sd21]
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch.nn import functional

from bench import measure, presets
from ovref.contract import Dropped
from ovref.models.attribution import FACTORS
from ovref.models.batch_size import automatic_batch_size
from ovref.models.loading import DTYPES
from ovref.models.recorders.unet import is_recorded
from ovref.stages.synthesize import Synthesize
from ovref.storage.shards import ShardFiles
from ovref_inference.places import sha256_of

SHARPER = 6.0
"""Factor of the weights of `to_q` and `to_k` in cross-attention: random ones attend evenly."""

SHARE_LEFT = 0.55
"""A share of the memory that a batch's tensors take at their peak. The allocator reserves more than
that, so a share of what it reserved may still be enough."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="sd21")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {
        "what": f"whole batches of {arguments.batch}, {arguments.preset}, {arguments.steps} steps",
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "dtypes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        write_weights(arguments.preset, folder, device)
        print(f"weights written in {time.perf_counter() - started:.1f} s", flush=True)
        for dtype in ("bfloat16", "float16"):
            found = results["dtypes"][dtype] = {}
            for name, value in check(folder, dtype, arguments, device):
                found[name] = value
                print(f"{dtype}: {name}: {value}", flush=True)
                (arguments.output / "works.json").write_text(json.dumps(results, indent=1) + "\n")


def write_weights(preset, folder, device):
    torch.manual_seed(0)
    pipeline = presets.pipeline(preset, "ddim", torch.bfloat16, device)
    for name in pipeline.unet.attn_processors:
        if is_recorded(name):
            attn = pipeline.unet.get_submodule(name.removesuffix(".processor"))
            for module in (attn.to_q, attn.to_k):
                module.weight.data *= SHARPER
    # A released model names a scheduler of diffusers.
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(folder)


def check(folder, dtype, arguments, device):
    """Yields names and what was found, one after the other."""
    spec = Synthesize(
        model=folder,
        scheduler="ddim",
        steps=arguments.steps,
        size_hw=presets.SIZES_HW[arguments.preset],
        dtype=dtype,
        batch_size=arguments.batch,
        min_area=0.0,
        max_area=1.0,  # what random weights draw must not be dropped
    )
    started = time.perf_counter()
    stage = spec.build()
    yield "seconds to load", time.perf_counter() - started
    generator = stage._generator
    embed = measure._embed_stage(arguments.preset, DTYPES[dtype], device, arguments.batch)
    prompts = measure._prompts(arguments.batch)
    runs = [whole(stage, embed, prompts) for _ in range(2)]
    images, references, drops, hashes = runs[0]
    yield "images", images
    yield "references", references
    yield "drops", drops
    yield "equal bytes on a second run", hashes == runs[1][3]
    yield "sha256", hashes

    given = measure.requested(stage, prompts)
    factor = generator._pipeline.vae_scale_factor
    latent_hw = tuple(side // factor for side in spec.size_hw)
    slow = WrittenOut(generator._pipeline.unet, given[1], latent_hw)
    with slow:
        generated = generator.generate_at_once(*given)
    gaps, spreads = [], []
    for one, expected_nhw in zip(generated, slow.heatmaps_bnhw(), strict=True):
        for found_hw, expected_hw in zip(one.heatmaps_nhw, expected_nhw, strict=False):
            spread = np.ptp(expected_hw)
            gaps.append(float(np.abs(found_hw - expected_hw).max() / spread))
            spreads.append(float(spread / expected_hw.mean()))
    yield "finite heatmaps", bool(all(np.isfinite(d.heatmaps_nhw).all() for d in generated))
    yield "heatmaps", len(gaps)
    yield "largest gap to the written-out softmax, of a heatmap's range", max(gaps)
    yield "median of a heatmap's range by its mean", float(np.median(spreads))

    if device.type != "cuda":
        return
    probe = replace(spec, steps=2).generator(generator._pipeline)
    started = time.perf_counter()
    yield "batch_size=auto", automatic_batch_size(generator._pipeline, probe)
    yield "seconds it took", time.perf_counter() - started
    yield "with too little memory", starved(probe, given)


def whole(stage, embed, prompts):
    """Images, references, drops by reason, and the hashes of the shards' files."""
    drops = {}
    with ShardFiles() as images, ShardFiles() as references:

        def kept():
            for record in stage(iter(prompts)):
                if isinstance(record, Dropped):
                    drops[record.reason] = drops.get(record.reason, 0) + 1
                else:
                    images.add(record)
                    yield record

        for reference in embed(kept()):
            if isinstance(reference, Dropped):
                drops[reference.reason] = drops.get(reference.reason, 0) + 1
            else:
                references.add(reference)
        hashes = [
            sha256_of(path)[:16]
            for files in (images.finish([]), references.finish([]))
            for path in files.values()
        ]
        return images.count, references.count, drops, hashes


class WrittenOut:
    """While it is entered, adds up explicit softmaxes of a UNet's cross-attention in float32."""

    def __init__(self, unet, positions, latent_hw):
        self._unet, self._positions, self._latent_hw = unet, positions, latent_hw
        self._sums, self._maps, self._handles = {}, 0, []

    def __enter__(self):
        for name in self._unet.attn_processors:
            if is_recorded(name):
                attn = self._unet.get_submodule(name.removesuffix(".processor"))
                queries = []
                self._handles += [
                    attn.to_q.register_forward_hook(lambda m, i, out, q=queries: q.append(out)),
                    attn.to_k.register_forward_hook(
                        lambda m, i, out, q=queries, heads=attn.heads: self._add(
                            q.pop(), out, heads
                        )
                    ),
                ]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def _add(self, query, key, heads):
        height, width = self._latent_hw
        sizes = {-(-height // f) * -(-width // f): f for f in FACTORS}
        if query.shape[1] not in sizes:
            return
        captions = len(self._positions)
        query, key = query[-captions:].float(), key[-captions:].float()
        query, key = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key))
        shares = torch.softmax(query @ key.mT / query.shape[3] ** 0.5, -1).sum(1)
        total = self._sums.setdefault(sizes[query.shape[2]], torch.zeros_like(shares))
        total += shares
        self._maps += heads

    def heatmaps_bnhw(self):
        """Per caption (nouns, h, w): every token's map upsampled, then averaged by noun."""
        height, width = self._latent_hw
        total = 0
        for factor, shares_bpk in self._sums.items():
            size_hw = (-(-height // factor), -(-width // factor))
            maps = shares_bpk.mT.unflatten(2, size_hw)
            total = total + functional.interpolate(maps, self._latent_hw, mode="bicubic")
        total = (total / self._maps).cpu()
        return [
            np.stack([total[b, list(tokens)].mean(0).clamp(min=0).numpy() for tokens in nouns])
            for b, nouns in enumerate(self._positions)
        ]


def starved(generator, given):
    """Generates with so little memory that the batch cannot fit, and about half of it can."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    generator.generate_at_once(*given)
    taken = torch.cuda.max_memory_allocated() - allocated
    torch.cuda.empty_cache()
    limit = reserved + SHARE_LEFT * taken
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        generated = generator.generate(*given)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "images": len(generated),
        "at once": generator._most_at_once,
        "GB that the batch takes": taken / 1e9,
        "GB that it may take": (limit - allocated) / 1e9,
        "finite": sum(d.image_hwc is not None for d in generated),
    }


if __name__ == "__main__":
    main()
