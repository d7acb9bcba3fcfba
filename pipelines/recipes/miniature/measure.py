"""Measures the shipped models of the miniature on held-out scenes.

    python -m recipes.miniature.measure [--split validation] [--output tests/benchmarks/results]

Writes `miniature.json` and `miniature.md`. Use `validation` for tuning; `test` is for the record.
Nothing measured here says anything about the real models.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModel

from ovref.miniature.scenes import combinations, render
from ovref.miniature.shapes import CLASSES, STUFF, THINGS
from ovref_miniature import WEIGHTS, weights_path
from recipes.miniature.architectures import Classifier
from recipes.miniature.heatmaps import (
    LOW_NOISE,
    TIMESTEPS,
    attention_of_scenes,
    iou_by_kind,
    minmax,
    otsu,
)
from recipes.miniature.train_clip import TEMPLATES
from recipes.miniature.training import images_to_torch

SAMPLING = {"num_inference_steps": 16, "guidance_scale": 4.0, "height": 64, "width": 64}
"""Recommended sampling settings of the miniature pipeline, with its own DDIM scheduler."""


def load_classifier():
    """The classifier that evaluates generated images, fp32."""
    model = Classifier()
    model.load_state_dict(load_file(weights_path("classifier") / "model.safetensors"))
    return model.eval()


def load_clip():
    """(model, tokenizer) of the miniature CLIP, fp32."""
    import open_clip

    name = f"local-dir:{weights_path('clip')}"
    model, _ = open_clip.create_model_from_pretrained(name)
    return model.eval(), open_clip.get_tokenizer(name)


def class_texts(model, tokenizer):
    """Unit text embedding of every class, averaged over the seven templates: (classes, d)."""
    texts = [t.format(c) for c in CLASSES for t in TEMPLATES]
    embedded = model.encode_text(tokenizer(texts), normalize=True)
    return functional.normalize(embedded.view(len(CLASSES), len(TEMPLATES), -1).mean(1), dim=-1)


def clip_scores(clip, images_nchw):
    """Cosine of every image with every class: (n, classes)."""
    model, tokenizer = clip
    return model.encode_image(images_nchw, normalize=True) @ class_texts(model, tokenizer).T


def measure_vae(vae, scenes):
    """Reconstruction: mean over scenes of the peak signal-to-noise ratio in dB."""
    x = images_to_torch(np.stack([s.image_hwc for s in scenes]))
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return {"psnr_db": float((-10 * torch.log10(((x - y) ** 2).mean((1, 2, 3)) / 4)).mean())}


def measure_heatmaps(pipeline, scenes):
    """Mean IoU of binarised heatmaps of noun mentions with the true masks.

    By timestep, by resolution of the attention layers (at the best timesteps), and by rule.
    """
    maps, classes, rows = attention_of_scenes(pipeline, scenes)

    def score(mask):
        return dict(zip(("things", "stuff"), iou_by_kind(mask, classes, rows, scenes), strict=True))

    low = maps[[i for i, t in enumerate(TIMESTEPS) if t in LOW_NOISE]].mean(0)
    rules = {f"minmax>{c}": minmax(low[0]) > c for c in (0.3, 0.4, 0.45, 0.5, 0.6)}
    rules["otsu"] = otsu(low[0])
    return {
        "mentions": len(classes),
        "otsu_16x16_by_timestep": {
            str(t): score(otsu(m[0])) for t, m in zip(TIMESTEPS, maps, strict=True)
        },
        "otsu_low_noise_by_layers": {
            name: score(otsu(m))
            for name, m in (("16x16", low[0]), ("8x8", low[1]), ("both", low.mean(0)))
        },
        "low_noise_16x16_by_rule": {name: score(m) for name, m in rules.items()},
    }


def prompts_of_split(split, per_thing=3):
    """`a <colour> <thing> on the <ground>` for combinations of a split: (prompts, class ids)."""
    prompts, ids = [], []
    for thing in THINGS:
        for colour, ground in combinations(split)[thing][:per_thing]:
            place = {"sky": "in the sky", "brick wall": "in front of a brick wall"}
            prompts.append(f"a {colour} {thing} {place.get(ground, f'on the {ground}')}")
            ids.append(CLASSES.index(thing))
    return prompts, np.array(ids)


def measure_generation(pipeline, clip, classifier, split, per_thing=3):
    """Share of generated images that show the requested thing, according to CLIP and the
    classifier."""
    prompts, ids = prompts_of_split(split, per_thing)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompts, generator=generators, output_type="np", **SAMPLING).images
    x = images_to_torch((images * 255).round().astype(np.uint8))
    first = len(STUFF)
    by_clip = clip_scores(clip, x)[:, first:].argmax(1).numpy() + first
    by_classifier = classifier(x)[:, first:].argmax(1).numpy() + first
    return {
        "images": len(prompts),
        "recognised_by_clip": float((by_clip == ids).mean()),
        "recognised_by_classifier": float((by_classifier == ids).mean()),
    }


def measure_recognition(clip, classifier, split, count=300):
    """On real scenes with one thing: is it the best thing, and is the best stuff present?"""
    scenes = [render(i, split, pair_share=0, plural_share=0, empty_share=0) for i in range(count)]
    x = images_to_torch(np.stack([s.image_hwc for s in scenes]))
    true = np.array([CLASSES.index(s.layout.groups[0].thing) for s in scenes])
    first, result = len(STUFF), {}
    stuff = np.array([[c in (s.layout.upper, s.layout.lower) for c in STUFF] for s in scenes])
    for name, scores in (("clip", clip_scores(clip, x)), ("classifier", classifier(x))):
        scores = scores.numpy()
        best = scores[:, :first].argmax(1)
        result[name] = {
            "things_top1": float((scores[:, first:].argmax(1) + first == true).mean()),
            "best_stuff_is_present": float(stuff[np.arange(count), best].mean()),
        }
    return result


def patch_labels(scenes, side):
    """Most frequent label of every patch: (n, (64 / side) ** 2)."""
    labels = np.stack([s.label_hw for s in scenes])
    n, grid = len(labels), labels.shape[1] // side
    blocks = (
        labels.reshape(n, grid, side, grid, side).transpose(0, 1, 3, 2, 4).reshape(-1, side * side)
    )
    counts = np.stack([(blocks == c).sum(1) for c in range(len(CLASSES))])
    return counts.argmax(0).reshape(n, grid * grid)


def dense_features(model, scenes, batch=32):
    """Patch tokens after the last norm, of unit length: float32 (n, patches, d)."""
    images = images_to_torch(np.stack([s.image_hwc for s in scenes]))
    tokens = [model(part).last_hidden_state[:, 1:] for part in images.split(batch)]
    return functional.normalize(torch.cat(tokens), dim=-1)


def _one_hot(labels):
    return functional.one_hot(labels, len(CLASSES))


def measure_backbone(model, split, bank=250, queries=120, neighbours=10):
    """Patch classification from train scenes: nearest neighbours and nearest class mean."""
    known, asked = (
        [render(10**7 + i) for i in range(bank)],
        [render(i, split) for i in range(queries)],
    )
    keys = dense_features(model, known).flatten(0, 1)
    labels = torch.from_numpy(patch_labels(known, 4)).flatten()
    x = dense_features(model, asked).flatten(0, 1)
    truth = torch.from_numpy(patch_labels(asked, 4)).flatten()
    means = functional.normalize(
        torch.stack([keys[labels == c].mean(0) for c in range(len(CLASSES))]), dim=-1
    )
    by_mean = (x @ means.T).argmax(1)
    by_vote = torch.cat([
        _one_hot(labels[(part @ keys.T).topk(neighbours).indices]).sum(1).argmax(1)
        for part in x.split(1024)
    ])  # fmt: skip
    thing = truth >= len(STUFF)
    return {
        f"{name}_{kind}": float((guess == truth)[where].float().mean())
        for name, guess in (("knn10", by_vote), ("class_mean", by_mean))
        for kind, where in (("things", thing), ("all", torch.ones_like(thing)))
    }


def parameters_of(name):
    """Number of parameters in the safetensors files of a shipped folder."""
    total = 0
    for path in sorted(weights_path(name).rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            total += sum(int(np.prod(file.get_slice(k).get_shape())) for k in file.keys())  # noqa: SIM118
    return total


@torch.no_grad()
def measure(split, heatmap_scenes=80):
    """All measurements of a split, as one dict."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        weights_path("stable_diffusion"), torch_dtype=torch.float32
    )
    clip, classifier = load_clip(), load_classifier()
    scenes = [render(i, split) for i in range(heatmap_scenes)]
    result = {
        "split": split,
        "parameters": {name: parameters_of(name) for name in WEIGHTS},
        "training": json.loads((weights_path("clip").parent / "training.json").read_text()),
        "sampling": SAMPLING,
        "vae": measure_vae(pipeline.vae, scenes),
        "recognition_of_real_scenes": measure_recognition(clip, classifier, split),
        "generation": measure_generation(pipeline, clip, classifier, split),
        "heatmaps": measure_heatmaps(pipeline, scenes),
    }
    for name in ("dinov2", "dino"):
        model = AutoModel.from_pretrained(weights_path(name), dtype=torch.float32).eval()
        result[name] = measure_backbone(model, split)
    return result


def _lines(value, prefix=""):
    """Rows of a Markdown table of nested results, one by one."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _lines(entry, f"{prefix}{key} / ")
        else:
            yield f"| {prefix}{key} | {f'{entry:.3f}' if isinstance(entry, float) else entry} |"


def run(measure, description, threads, name, title, about):
    """The command line of a measurement: measures a split, writes `name`.json and `name`.md,
    prints.

    Args:
        measure: split -> nested results.
        description: description of the command.
        threads: default number of torch threads.
        title: title of the document.
        about: its first lines, with `{split}`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results"))
    parser.add_argument("--threads", type=int, default=threads)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    result = measure(arguments.split)
    result["seconds"] = round(time.perf_counter() - began, 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = [
        f"# {title}",
        "",
        *(line.format(split=arguments.split) for line in about),
        "",
        "| what | value |",
        "|---|---|",
        *_lines(result),
    ]
    (arguments.output / f"{name}.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


def main():
    run(
        measure,
        __doc__,
        threads=2,
        name="miniature",
        title="The miniature models, measured",
        about=(
            "Split `{split}`; written by `python -m recipes.miniature.measure`. These numbers",
            "are about the drawn world and its small models only. Shares and IoU are in [0, 1].",
        ),
    )


if __name__ == "__main__":
    main()
