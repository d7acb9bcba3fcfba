"""What each part of `fossil_2026` that replaces one of FOSSIL's does on the miniature.

The same captions and seeds, in configurations that differ from another one in a part or two: a
generator with joint attention, four steps without guidance, the reading that is the default of
FLUX.2, one model for images and texts; alone and together. The miniature has no weights distilled
for four steps, and one text tower. Which blocks and steps of the transformer are read with `share`
was chosen on validation scenes (`recipes.miniature.measure_transformer --split validation`).

    python tests/benchmarks/compare_generators.py [--captions 100] [--scenes 200] [--cache FOLDER]

FOSSIL clusters references with several seeds of k-means: the mean is given, and the difference from
the other configuration with the 95 % interval of a paired bootstrap over scenes and seeds. Cost is
counted in rows of the network an image (a guided step costs two). All figures are of the miniature.
Builds are kept under the cache and are not repeated; one that was stopped is continued.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from machine import commit
from ovref.config import load
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.compare import bootstrap_times, miou_of_samples
from ovref.evaluation.evaluate import EvaluateSpec
from ovref.evaluation.methods import Row
from ovref_pipelines import recipe
from quality import overlaps, resampled
from steps import MASKS, built, weights_of

ROOT = Path(__file__).parent.parent.parent
CLIP = (
    "embed.visual.model=miniature:clip", "embed.visual.library=open_clip",
    "embed.visual.features=values",
)  # fmt: skip
FEW = ("synthesize.steps=4", "synthesize.guidance=1.0", "synthesize.guided_share=1.0")
OUTPUT = (
    "synthesize.reading=output", "synthesize.blocks=[4,5,6]", "synthesize.read_steps=[0.7,1.0]",
)  # fmt: skip
UNET, JOINT = "UNet", "transformer"
SETTINGS = {
    UNET: ("miniature", (), None),
    "UNet, as in the demo": ("miniature_fast", (), UNET),
    "UNet, 4 steps without guidance": ("miniature", FEW, UNET),
    "UNet, CLIP as backbone": ("miniature", CLIP, UNET),
    JOINT: ("miniature_transformer", (), UNET),
    "transformer, 4 steps without guidance": ("miniature_transformer", FEW, JOINT),
    "transformer, `output` of the last 3 blocks": ("miniature_transformer", OUTPUT, JOINT),
    "transformer, with these three changes": (
        "miniature_transformer", (*FEW, *OUTPUT, *CLIP), UNET,
    ),
}  # fmt: skip
"""Name -> configuration, changes, the name of what it is compared with."""
SEEDS = (0, 1, 2)
"""Seeds of k-means."""


def config_of(name, folder, arguments):
    place = folder / "".join(c if c.isalnum() else "_" for c in name)
    config, changes, _ = SETTINGS[name]
    return load(recipe.BuildConfig, ROOT / f"configs/{config}.yaml", [
        f"output={place}", f"corpus.limit={arguments.captions}",
        f"corpus.path={ROOT / 'configs/miniature_captions.txt'}", "engine.engine=local",
        "engine.workers=1", f"engine.threads={arguments.threads}", *changes,
    ])  # fmt: skip


def measure(found, arguments):
    """Name -> what the page shows, as plain values."""
    first = next(iter(found.values()))
    spec = EvaluateSpec(
        collection=first["collection"], output="", split=arguments.split, scenes=arguments.scenes,
        rows=tuple(MASKS.values()),
    )  # fmt: skip
    kinds = [Row(name=kind, changes=(("seed", n),)) for kind in MASKS.values() for n in SEEDS]
    data = spec.open_data()
    examples = list(data)
    times_sn = bootstrap_times(len(examples))
    sampled = {}
    with CachedModels("cpu") as models:
        for name, one in found.items():
            each = overlaps(Path(one["collection"]), kinds, spec, data, models, examples)
            miou_xs = np.stack([miou_of_samples(o, times_sn) for o in each])
            parts = np.split(miou_xs, len(MASKS))
            sampled[name] = dict(zip(MASKS, parts, strict=True))
            print(name, {title: p[:, 0].round(3).tolist() for title, p in sampled[name].items()})
    rows = {}
    for name, one in found.items():
        rows[name] = {
            "unet_rows": one["unet_rows"],
            "references": len(one["visual"]),
            "seeds": {title: part[:, 0].tolist() for title, part in sampled[name].items()},
        }
        base = SETTINGS[name][2]
        if base in found:
            gains = {title: sampled[name][title] - sampled[base][title] for title in MASKS}
            rows[name]["compared_with"] = base
            rows[name]["difference"] = {
                title: [
                    float(gain_ns[:, 0].mean()),
                    *np.quantile(resampled(gain_ns[:, 1:]), (0.025, 0.975)).tolist(),
                ]
                for title, gain_ns in gains.items()
            }
    return rows


def report(results):
    titles = list(MASKS)
    lines = [
        "# Generators, and what replaces FOSSIL's parts in `fossil_2026`",
        "",
        "The miniature's models at the same captions and seeds: no figure here is one of a real "
        f"model. {results['captions']} captions, {results['scenes']} {results['split']} scenes; "
        f"weights of the UNet {results['weights']['unet']}, of the transformer "
        f"{results['weights']['transformer']}; torch {results['torch']}; {results['commit']}. "
        f"FOSSIL's mIoU in %: mean of {len(SEEDS)} seeds of k-means (lowest to highest), and the "
        "difference from another row with the 95 % interval of a paired bootstrap over scenes and "
        "seeds. Made by `tests/benchmarks/compare_generators.py`, whose first lines say how.",
        "",
        f"| | rows | references | {' | '.join(titles)} |",
        f"|---|{'---:|' * (2 + len(titles))}",
    ]
    for name, row in results["rows"].items():
        scores = [
            f"{100 * np.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
            for values in row["seeds"].values()
        ]
        lines.append(
            f"| {name} | {row['unet_rows']} | {row['references']} | {' | '.join(scores)} |"
        )
    lines += [
        "",
        f"| difference | from | {' | '.join(titles)} |",
        f"|---|---|{'---:|' * len(titles)}",
    ]
    for name, row in results["rows"].items():
        if "difference" not in row:
            continue
        shown = [
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in values))
            for values in row["difference"].values()
        ]
        lines.append(f"| {name} | {row['compared_with']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=200, help="0 to build only")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "ovref_generators",
        help="folder for the builds, kept",
    )  # fmt: skip
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these settings")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weights = {
        "unet": weights_of("stable_diffusion", "unet"),
        "transformer": weights_of("stable_diffusion_3", "transformer"),
    }
    folder = arguments.cache / "_".join([*weights.values(), str(arguments.captions)])
    found = {}
    for name in SETTINGS:
        if arguments.only is None or name in arguments.only:
            found[name] = built(config_of(name, folder, arguments), arguments.captions)
            print(f"{name}: built", flush=True)
    if arguments.scenes == 0:
        return
    results = {
        "what": "the parts of fossil_2026 that replace FOSSIL's",
        "model": "the miniature: no figure here is one of a real model",
        "weights": weights,
        "captions": arguments.captions,
        "scenes": arguments.scenes,
        "split": arguments.split,
        "torch": torch.__version__,
        "commit": commit(),
        "seeds": SEEDS,
        "rows": measure(found, arguments),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / (
        "generators" if arguments.split == "test" else "generators_validation"
    )
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
