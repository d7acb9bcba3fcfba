"""castorini/daam as released on a GPU: images a second, bare and with its `trace`, one at a time.

Stable Diffusion 2.1-base's architecture has random weights, made on the device: values do not
matter for speed. Bare images and images with daam are drawn in turn, each up to the picture; with
daam, the global heatmap and those of three nouns are in the time, as its README has them made.

    python tests/benchmarks/daam_gpu.py --prepare FOLDER     # with ovref: numbers and tokenizer
    PYTHONPATH=SITE python tests/benchmarks/daam_gpu.py --run FOLDER      # with daam, without ovref

SITE is a folder which hides what the machine has: daam 0.2.0, its own code untouched, and of its
pins diffusers 0.21.2 and accelerate 0.23.0. Not kept, for a machine with Python 3.12:

- transformers 4.30.2 wants tokenizers below 0.14, which have no wheels for it. Taken are
  transformers 4.35.2 and tokenizers 0.14.1, the nearest that have; only the text encoder's 23
  layers, one call an image, are transformers'.
- huggingface_hub is 0.25.2, the last that diffusers 0.21.2 can be imported with.
- spaCy is an empty stand-in: daam names it for `parsed_heat_maps`, which is not called.
- PyTorch and NumPy, which daam does not pin, are the machine's. Newer PyTorch calls
  `torch.cuda.amp.autocast` deprecated each time daam enters it; such warnings are silenced.

`--own-loop` needs no daam and takes any diffusers: daam's reading of attention made again, should
the package fail on a machine.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

CAPTIONS = {
    "a red bus beside a small dog under an apple tree": ["bus", "dog", "tree"],
    "a wooden table with a white cup and a bowl of oranges": ["table", "cup", "bowl"],
    "two horses and a man in a hat on a beach below dark clouds": ["horses", "hat", "beach"],
    "a cat asleep on a blue sofa next to a lamp and some books": ["cat", "sofa", "lamp"],
    "a bicycle leaning on a brick wall in front of a flower shop": ["bicycle", "wall", "shop"],
    "an old train crossing a stone bridge over a river": ["train", "bridge", "river"],
}
SMALL = {
    "unet": {
        "sample_size": 64,
        "cross_attention_dim": 32,
        "attention_head_dim": [1, 2, 4, 4],
        "use_linear_projection": True,
        "block_out_channels": [32, 32, 64, 64],
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1},
    "text": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
}
"""What takes the place of the published numbers in a rehearsal; 64 x 64 latents all the same."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", type=Path, metavar="FOLDER", help="to be written")
    what.add_argument("--run", type=Path, metavar="FOLDER", help="as --prepare left it")
    default = Path(__file__).parent / "results" / "daam_gpu.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", default=["float16"], help="one after the other")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--images", type=int, default=3, help="of each kind")
    parser.add_argument("--seconds", type=float, default=30, help="after which no pair is begun")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--own-loop", action="store_true", help="daam's loop without daam")
    parser.add_argument("--small", action="store_true", help="tiny networks, for a rehearsal")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
    else:
        run(arguments)


def prepare(folder):
    """Writes the published numbers and CLIP's tokenizer, in the files that transformers 4 reads."""
    from bench import presets
    from daam_full_size import write_old_tokenizer

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as new:
        presets.clip_tokenizer().save_pretrained(new)
        write_old_tokenizer(Path(new))
        for name in ("vocab.json", "merges.txt"):
            (tokenizer / name).write_bytes((Path(new) / name).read_bytes())
    numbers = {
        "unet": presets.UNETS["sd21"],
        "vae": presets.VAE,
        "text": presets.TEXT["sd21"],
        "noise": presets.NOISE,
    }
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


def run(arguments):
    # Other frameworks on the machine are not to be imported, nor anything fetched.
    os.environ.update(USE_TF="0", USE_FLAX="0", USE_TORCH="1", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = {
        "what": "Stable Diffusion 2.1-base in full size, one image at a time",
        "model": "tiny networks: a rehearsal" if arguments.small else "random weights",
        "attribution": "daam's loop made again" if arguments.own_loop else "daam's trace",
        "device": device_name(arguments.device),
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "versions": versions(arguments.own_loop),
        "clock": "wall, the device waited for; text encoding and decoding to a picture included",
    }
    for dtype in arguments.dtype:
        for found in measure(arguments, dtype):
            results[dtype] = found
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({dtype: results[dtype]}), flush=True)
    print(json.dumps(results, indent=1), flush=True)


def device_name(device):
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def versions(own_loop):
    names = ["torch", "numpy", "diffusers", "transformers", "tokenizers", "huggingface_hub"]
    return {n: importlib.metadata.version(n) for n in [*names, *(["daam"] * (not own_loop))]}


def measure(arguments, dtype):
    """Yields what is known after each pair of images, one bare and one with attribution."""
    import torch

    device, cuda = torch.device(arguments.device), arguments.device.startswith("cuda")
    began = time.perf_counter()
    pipeline = build(arguments.run, device, getattr(torch, dtype), arguments.small)
    traced = own_loop if arguments.own_loop else with_daam
    jobs = list(CAPTIONS.items())

    def generate(kind, number, steps):
        caption, words = jobs[number % len(jobs)]

        def bare():
            return pipeline(
                caption, num_inference_steps=steps, guidance_scale=arguments.guidance,
                generator=torch.Generator(device).manual_seed(number),
            ).images[0]  # fmt: skip

        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.no_grad():
            outcome = {}
            if kind == "bare":
                bare()
            else:
                outcome = traced(pipeline, bare, caption, words)
            if cuda:
                torch.cuda.synchronize()
        seconds[kind].append(time.perf_counter() - start)
        if cuda:
            outcome["peak"] = torch.cuda.max_memory_allocated()
        return outcome

    kinds = ("bare", "traced")
    seconds = {kind: [] for kind in kinds}
    for kind in kinds:
        generate(kind, 0, min(3, arguments.steps))
    warm_seconds, ready = {k: s.pop() for k, s in seconds.items()}, time.perf_counter()
    print(f"{dtype}: ready after {ready - began:.1f} s, of which {warm_seconds}", flush=True)
    peaks, outcome = {}, {}
    for number in range(arguments.images):
        if time.perf_counter() - ready > arguments.seconds:
            break
        for kind in kinds[:: -1 if number % 2 else 1]:
            outcome |= generate(kind, number, arguments.steps)
            peaks[kind] = max(peaks.get(kind, 0), outcome.get("peak", 0))
            print(f"{dtype} {kind} {seconds[kind][-1]:.3f} s", flush=True)
        medians = {kind: statistics.median(times) for kind, times in seconds.items()}
        yield {
            "seconds_an_image": medians,
            "images_a_second": {kind: 1 / median for kind, median in medians.items()},
            "attribution_percent": 100 * (medians["traced"] / medians["bare"] - 1),
            "every_image": {kind: list(times) for kind, times in seconds.items()},
            "peak_bytes": peaks,
            **{name: value for name, value in outcome.items() if name != "peak"},
        }


def build(folder, device, dtype, small):
    """Stable Diffusion 2.1-base, made on the device as `bench.presets` makes it."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    numbers = json.loads((folder / "numbers.json").read_text())
    if small:
        numbers = {name: value | SMALL.get(name, {}) for name, value in numbers.items()}
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **numbers["text"],
    )
    torch.manual_seed(0)

    def made(module, *given, **numbers):
        with torch.device(device):
            return module(*given, **numbers).eval().requires_grad_(False).to(dtype)

    pipeline = StableDiffusionPipeline(
        vae=made(AutoencoderKL, **numbers["vae"]),
        text_encoder=made(CLIPTextModel, text),
        tokenizer=tokenizer,
        unet=made(UNet2DConditionModel, **numbers["unet"]),
        scheduler=DDIMScheduler(**numbers["noise"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_daam(pipeline, bare, caption, words):
    """As daam's README has it; the caption it uses is the one it saw drawn."""
    from daam import trace

    with trace(pipeline) as tracer:
        bare()
        # Latents are 64 x 64, so what it takes by default is every map (see daam_released.py).
        found = tracer.compute_global_heat_map()
        maps = [found.compute_word_heat_map(word).heatmap.cpu() for word in words]
        stored = dict(tracer.all_heat_maps)
    return summary_of(stored, maps, sorted({factor for factor, _, _ in stored}))


def summary_of(stored, maps, factors):
    return {
        "heat_maps": len(stored),
        "heat_map_bytes": sum(each.nbytes for each in stored.values()),
        "factors": factors,
        "word_map": list(maps[0].shape),
        "word_maps_finite": all(bool(each.isfinite().all()) for each in maps),
    }


def own_loop(pipeline, bare, caption, words):
    """What daam does with each layer, step and head, and at the end, made again."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    stored = {}

    def reader(layer):
        def read(attention, hidden, encoder_hidden_states=None, attention_mask=None, **_):
            context = hidden if encoder_hidden_states is None else encoder_hidden_states
            query = attention.head_to_batch_dim(attention.to_q(hidden))
            key = attention.head_to_batch_dim(attention.to_k(context))
            value = attention.head_to_batch_dim(attention.to_v(context))
            probabilities = attention.get_attention_scores(query, key, attention_mask)
            side = int(probabilities.shape[1] ** 0.5)
            half = probabilities.shape[0] // 2  # the first half is without the caption
            tokens = [each.view(-1, side, side)[half:] for each in probabilities.permute(2, 0, 1)]
            heads = torch.stack(tokens).permute(1, 0, 2, 3).contiguous()
            for head, heat_map in enumerate(heads):
                stored[layer, head] = stored.get((layer, head), 0.0) + heat_map
            out = attention.batch_to_head_dim(torch.bmm(probabilities, value))
            return attention.to_out[1](attention.to_out[0](out))

        return read

    unet = pipeline.unet
    layers = [
        module
        for blocks in (unet.up_blocks, unet.down_blocks)
        for name, module in blocks.named_modules()
        if name.endswith("attn2")
    ]
    before = [module.processor for module in layers]
    try:
        for number, module in enumerate(layers):
            module.set_processor(reader(number))
        bare()
    finally:
        for module, processor in zip(layers, before, strict=True):
            module.set_processor(processor)
    side = unet.config.sample_size
    enlarged = [
        F.interpolate(each[:, None], size=(side, side), mode="bicubic").clamp_(min=0)
        for each in stored.values()
    ]
    mean = torch.stack(enlarged).mean(0)[:, 0]
    tokens = pipeline.tokenizer.tokenize(caption)
    ends = [tokens.index(f"{word}</w>") + 1 for word in words]
    return summary_of(stored, [mean[end].cpu() for end in ends], None)


if __name__ == "__main__":
    main()
