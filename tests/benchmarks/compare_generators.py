"""The miniature's generator with joint attention beside its UNet: references and FOSSIL's mIoU.

The same captions and seeds, in configurations that differ in the generator alone. Which blocks and
steps of the transformer are read was chosen on validation scenes
(`recipes.miniature.measure_transformer --split validation`). Further rows have what `fossil_2026`
has in place of FOSSIL's parts: a generator with joint attention, four steps without guidance, the
reading that is the default of its family, one model for images and texts; alone and together. The
miniature has no weights distilled for four steps, and one text tower.

    python tests/benchmarks/compare_generators.py [--captions 100] [--scenes 100] [--cache FOLDER]

Cost is counted in rows of the network an image (a guided step costs two). All figures are of the
miniature. Builds are kept under the cache and are not repeated; one that was stopped is continued.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from ovref.config import load
from ovref_pipelines import recipe
from steps import MASKS, built, measure, weights_of

ROOT = Path(__file__).parent.parent.parent
CLIP = (
    "embed.visual.model=miniature:clip", "embed.visual.library=open_clip",
    "embed.visual.features=values",
)  # fmt: skip
FEW = ("synthesize.steps=4", "synthesize.guidance=1.0", "synthesize.guided_share=1.0")
OUTPUT = (
    "synthesize.reading=output", "synthesize.blocks=[4,5,6]", "synthesize.read_steps=[0.7,1.0]",
)  # fmt: skip
SETTINGS = {
    "UNet": ("miniature", ()),
    "UNet, as in the demo": ("miniature_fast", ()),
    "transformer": ("miniature_transformer", ()),
    "UNet, 4 steps without guidance": ("miniature", FEW),
    "transformer, 4 steps without guidance": ("miniature_transformer", FEW),
    "transformer, `output` of the last 3 blocks": ("miniature_transformer", OUTPUT),
    "UNet, CLIP as backbone": ("miniature", CLIP),
    "transformer, with these three changes": (
        "miniature_transformer", (*FEW, *OUTPUT, *CLIP),
    ),
}  # fmt: skip
"""Name -> configuration, changes."""


def config_of(name, folder, arguments):
    place = folder / "".join(c if c.isalnum() else "_" for c in name)
    config, changes = SETTINGS[name]
    return load(recipe.BuildConfig, ROOT / f"configs/{config}.yaml", [
        f"output={place}", f"corpus.limit={arguments.captions}",
        f"corpus.path={ROOT / 'configs/miniature_captions.txt'}", "engine.engine=local",
        "engine.workers=1", f"engine.threads={arguments.threads}", *changes,
    ])  # fmt: skip


def report(results):
    titles = list(MASKS)
    lines = [
        "# Generators",
        "",
        "The miniature's generators at the same captions and seeds: no figure here is one of a "
        f"real model. {results['captions']} captions, {results['scenes']} {results['split']} "
        f"scenes; weights of the UNet {results['weights']['unet']}, of the transformer "
        f"{results['weights']['transformer']}; torch {results['torch']}. FOSSIL's mIoU in %. Made "
        "by `tests/benchmarks/compare_generators.py`, whose first lines say how.",
        "",
        f"| | rows | references | {' | '.join(titles)} |",
        f"|---|{'---:|' * (2 + len(titles))}",
    ]
    for name, row in results["rows"].items():
        scores = [f"{100 * row['miou'][title]:.1f}" for title in titles]
        lines.append(
            f"| {name} | {row['unet_rows']} | {row['references']} | {' | '.join(scores)} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=100, help="0 to build only")
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
        "what": "generators with cross-attention and with joint attention",
        "model": "the miniature: no figure here is one of a real model",
        "weights": weights,
        "captions": arguments.captions,
        "scenes": arguments.scenes,
        "split": arguments.split,
        "torch": torch.__version__,
        "rows": {
            name: {key: row[key] for key in ("unet_rows", "references", "miou")}
            for name, row in measure(found, arguments).items()
        },
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
