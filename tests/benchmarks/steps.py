"""Fewer steps: what a cheaper sampling does to heatmaps, references and FOSSIL's mIoU.

Every setting uses the same captions and seeds; all else is configs/miniature.yaml. Cost
is counted in UNet rows an image (a guided step costs two) and measured in CPU time of the process.
The first setting, 50 guided DDIM steps as in the paper, is what the others are compared with:

- masks: mean intersection over union of a noun's mask with the mask of the same caption, seed and
  noun in the first setting. Fewer steps draw another image, so this is not an error;
- references: mean cosine of the visual embeddings, likewise;
- mIoU of FOSSIL on held-out scenes, with proposals, without, and with oracle masks.

All figures are of the miniature. Its UNet was not distilled, so the schedulers of LCM and of Turbo
(Euler) show what few steps do to a common model, not what a distilled one can.

    python tests/benchmarks/steps.py [--split validation] [--cache FOLDER] [--only NAME]

Builds are kept under the cache, in a folder named by the UNet's weights, and are not repeated.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ovref.config import load
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.evaluate import EvaluateSpec
from ovref.evaluation.methods import Methods, Row
from ovref.models.recorders import guided_steps
from ovref.records import YES
from ovref_inference.models import resolve
from ovref_pipelines import recipe
from paper_tables.tune import miou

SETTINGS = {
    "ddim 50": ("ddim", 50, 4.0, 1.0),
    "dpm++ 25": ("dpm_solver++", 25, 4.0, 1.0),
    "dpm++ 20": ("dpm_solver++", 20, 4.0, 1.0),
    "dpm++ 15": ("dpm_solver++", 15, 4.0, 1.0),
    "dpm++ 10": ("dpm_solver++", 10, 4.0, 1.0),
    "dpm++ 10, half guided": ("dpm_solver++", 10, 4.0, 0.5),
    "dpm++ 10, unguided": ("dpm_solver++", 10, 1.0, 1.0),
    "dpm++ 8, half guided": ("dpm_solver++", 8, 4.0, 0.5),
    "dpm++ 6, half guided": ("dpm_solver++", 6, 4.0, 0.5),
    "dpm++ 5, unguided": ("dpm_solver++", 5, 1.0, 1.0),
    "unipc 20": ("unipc", 20, 4.0, 1.0),
    "unipc 10": ("unipc", 10, 4.0, 1.0),
    "unipc 10, half guided": ("unipc", 10, 4.0, 0.5),
    "unipc 5": ("unipc", 5, 4.0, 1.0),
    "unipc 5, unguided": ("unipc", 5, 1.0, 1.0),
    "lcm 8": ("lcm", 8, 4.0, 1.0),
    "lcm 8, unguided": ("lcm", 8, 1.0, 1.0),
    "lcm 4": ("lcm", 4, 4.0, 1.0),
    "lcm 4, unguided": ("lcm", 4, 1.0, 1.0),
    "lcm 2": ("lcm", 2, 4.0, 1.0),
    "lcm 2, unguided": ("lcm", 2, 1.0, 1.0),
    "lcm 1": ("lcm", 1, 4.0, 1.0),
    "lcm 1, unguided": ("lcm", 1, 1.0, 1.0),
    "euler 4, unguided": ("euler", 4, 1.0, 1.0),
    "euler 2, unguided": ("euler", 2, 1.0, 1.0),
    "euler 1, unguided": ("euler", 1, 1.0, 1.0),
}
"""Name -> scheduler, steps, guidance, share of the steps that are guided."""

MASKS = {
    "FOSSIL": "fossil",
    "without proposals": "fossil_no_proposals",
    "oracle masks": "fossil_oracle",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test",
        help="validation to choose by, test to report",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "ovref_steps",
        help="folder for the builds, kept",
    )  # fmt: skip
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these settings and the first")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = [n for n in SETTINGS if arguments.only is None or n in arguments.only]
    first = next(iter(SETTINGS))
    names = [first, *(n for n in names if n != first)]

    weights = weights_of("stable_diffusion", "unet")
    folder = arguments.cache / f"{weights}_{arguments.captions}"
    built = {}
    for name in names:
        built[name] = build(name, folder, arguments)
        print(f"{name}: {built[name]['cpu_seconds_per_image']:.3f} s an image", flush=True)
    rows = measure(built, arguments)
    results = {
        "what": "cost and quality of fewer sampling steps",
        "model": "the miniature: no figure here is one of a real model",
        "unet_weights": weights,
        "captions": arguments.captions,
        "scenes": arguments.scenes,
        "split": arguments.split,
        "clock": "CPU time of the process, while generating, embedding and reducing",
        "torch": torch.__version__,
        "rows": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / ("steps" if arguments.split == "test" else "steps_validation")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))
    print(report(results))


def weights_of(model, part):
    """The first letters of the hash of the weights of a shipped model's part."""
    path = next((Path(resolve(f"miniature:{model}")) / part).glob("*.safetensors"))
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def config_of(name, folder, arguments):
    scheduler, steps, guidance, guided_share = SETTINGS[name]
    place = folder / "".join(c if c.isalnum() else "_" for c in name)
    settings = [
        f"output={place}",
        f"corpus.limit={arguments.captions}",
        f"synthesize.scheduler={scheduler}",
        f"synthesize.steps={steps}",
        f"synthesize.guidance={guidance}",
        f"synthesize.guided_share={guided_share}",
        "engine.engine=local",
        "engine.workers=1",
        f"engine.threads={arguments.threads}",
    ]
    root = Path(__file__).parent.parent.parent
    settings.append(f"corpus.path={root / 'configs/miniature_captions.txt'}")
    return load(recipe.BuildConfig, root / "configs/miniature.yaml", settings)


def build(name, folder, arguments):
    """Builds the setting's collection, or takes it from the cache."""
    return built(config_of(name, folder, arguments), arguments.captions)


def built(config, captions):
    """The collection of a configuration and what it cost, built unless it exists.

    Args:
        captions: number of captions that the configuration generates from.
    """
    timing = Path(config.output) / "cpu_seconds.json"
    if not timing.exists():
        started = time.process_time()
        recipe.build(config)
        timing.write_text(json.dumps(time.process_time() - started))
    folders = recipe.open_steps(config)
    masks, visual = {}, {}
    for shard in folders.images.commits():
        for record in folders.images.read(shard):
            for region in record.regions:
                masks[record.key, region.noun.text] = region.mask_hw == YES
    for shard in folders.references.commits():
        for reference in folders.references.read(shard):
            key = reference.key.partition("#")[0]
            visual[key, reference.noun.text] = reference.visual.astype(np.float32)
    made = config.synthesize
    guided = guided_steps(made.steps, made.guidance, made.guided_share)
    return {
        "collection": str(Path(config.output) / "collection"),
        "cpu_seconds_per_image": json.loads(timing.read_text()) / captions,
        "unet_rows": made.steps + guided,
        "masks": masks,
        "visual": visual,
    }


def measure(built, arguments):
    first = next(iter(built.values()))
    spec = EvaluateSpec(
        collection=first["collection"], output="", split=arguments.split, scenes=arguments.scenes
    )
    rows, data = {}, spec.open_data()
    examples = list(data)
    for name, found in built.items():
        with CachedModels() as models:
            collection = models.collection(found["collection"])
            methods = Methods(spec, data, models, collection)
            methods.encode_batch(examples)
            scores = {
                title: miou(methods.segmenter(Row(name=kind)), examples, data.class_names)
                for title, kind in MASKS.items()
            }
        both = found["masks"].keys() & first["masks"].keys()
        pairs = [(found["masks"][key], first["masks"][key]) for key in both]
        common = found["visual"].keys() & first["visual"].keys()
        common = {k for k in common if found["visual"][k].shape == first["visual"][k].shape}
        rows[name] = {
            "unet_rows": found["unet_rows"],
            "times_fewer_rows": first["unet_rows"] / found["unet_rows"],
            "times_faster": first["cpu_seconds_per_image"] / found["cpu_seconds_per_image"],
            "cpu_seconds_per_image": found["cpu_seconds_per_image"],
            "references": len(found["visual"]),
            "mask_iou": float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])),
            "reference_cosine": float(
                np.mean([found["visual"][k] @ first["visual"][k] for k in common])
            ),
            "miou": {title: float(value) for title, value in scores.items()},
        }
    base = rows[next(iter(rows))]["miou"]
    for row in rows.values():
        row["share_of_miou"] = {title: row["miou"][title] / base[title] for title in MASKS}
    return rows


def report(results):
    titles = list(MASKS)
    lines = [
        "# Fewer steps",
        "",
        f"{results['what'].capitalize()}. {results['model'].capitalize()}. {results['captions']} "
        f"captions, {results['scenes']} {results['split']} scenes; UNet weights "
        f"{results['unet_weights']}; torch {results['torch']}; {results['clock']}. mIoU in %, "
        "and in brackets as a share of the first row's. Made by `tests/benchmarks/steps.py`, whose "
        "first lines say what each column is.",
        "",
        f"| | UNet rows | fewer | faster | masks | references | {' | '.join(titles)} |",
        f"|---|{'---:|' * (5 + len(titles))}",
    ]
    for name, row in results["rows"].items():
        scores = [
            f"{100 * row['miou'][title]:.1f} ({row['share_of_miou'][title]:.0%})"
            for title in titles
        ]
        lines.append(
            f"| {name} | {row['unet_rows']} | {row['times_fewer_rows']:.1f}x | "
            f"{row['times_faster']:.1f}x | {row['mask_iou']:.2f} | {row['reference_cosine']:.2f} | "
            f"{' | '.join(scores)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
