"""Measures the miniature Stable Diffusion 3 beside the UNet, on held-out scenes.

    python -m recipes.miniature.measure_transformer [--split validation] [--output DIR]

Writes `miniature_transformer.json` and `.md`, for another split than `test` with its name: how well
the attribution of real scenes with noise agrees with their true masks, by block, timestep and
reading; and how many generated images show what was asked for. Use `validation` to choose by,
`test` for the record. Nothing measured here says anything about the real models.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from ovref.miniature.scenes import render
from ovref_miniature import weights_path
from recipes.miniature import heatmaps
from recipes.miniature.heatmaps_transformer import (
    READINGS,
    TIMESTEPS,
    attention_of_scenes,
    enlarged,
)
from recipes.miniature.measure import (
    SAMPLING,
    load_classifier,
    load_clip,
    measure_generation,
    parameters_of,
)

NAME = "stable_diffusion_3"
PER_THING = 1
"""Images generated of each thing."""
THRESHOLD = 0.45
"""Threshold of stretched maps; the default of `ovref.ops.binarisation`."""


def load_transformer():
    """The shipped StableDiffusion3Pipeline, fp32."""
    folder = weights_path(NAME)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent)


def rules_of(maps_nhw):
    """Masks by both rules: Otsu's threshold for every map, and one threshold for all."""
    return {"otsu": heatmaps.otsu(maps_nhw), "fixed": heatmaps.minmax(maps_nhw) > THRESHOLD}


def score(maps_nhw, classes, rows, scenes):
    """IoU with the true masks by rule: {rule: (things, stuff)}, rounded."""
    return {
        name: [round(v, 4) for v in heatmaps.iou_by_kind(masks, classes, rows, scenes)]
        for name, masks in rules_of(maps_nhw).items()
    }


def mean_of(pair):
    """Things and stuff count alike."""
    return sum(pair) / 2


def measure_blocks(pipeline, scenes):
    """IoU by reading, block and timestep, and of sums over blocks and timesteps.

    Sums are over what the product would read: raw maps of a range of blocks and timesteps.
    """
    maps, classes, rows = attention_of_scenes(pipeline, scenes)
    blocks = maps.shape[2]
    result = {"mentions": len(classes), "blocks": blocks, "timesteps": list(TIMESTEPS)}
    times = range(len(TIMESTEPS))

    def scored(maps_nhw):
        return score(enlarged(maps_nhw), classes, rows, scenes)

    for reading, by_time in zip(READINGS, maps, strict=True):
        result[reading] = {
            "one block, one timestep": [
                [scored(by_time[t, b]) for t in times] for b in range(blocks)
            ],
            "one block, all timesteps": [scored(by_time[:, b].mean(0)) for b in range(blocks)],
            "all blocks, one timestep": [scored(by_time[t].mean(0)) for t in times],
            "everything": scored(by_time.mean((0, 1))),
            "ranges": [
                {"blocks": [b, e], "timesteps": [TIMESTEPS[t], TIMESTEPS[u - 1]],
                 **scored(by_time[t:u, b:e].mean((0, 1)))}
                for b in range(blocks) for e in range(b + 1, blocks + 1)
                for t, u in ((0, 2), (0, 3), (0, 5), (1, 4), (2, 5))
            ],
        }  # fmt: skip
        result[reading]["ranges"].sort(key=lambda row: -mean_of(row["otsu"]))
        del result[reading]["ranges"][6:]
    return result


def measure_unet(pipeline, scenes):
    """The same of the UNet's 16 x 16 cross-attention layers, at the same timesteps."""
    maps, classes, rows = heatmaps.attention_of_scenes(pipeline, scenes, TIMESTEPS)
    return {
        "one timestep": [score(m[0], classes, rows, scenes) for m in maps],
        "100 to 300": score(maps[:2, 0].mean(0), classes, rows, scenes),
        "everything": score(maps[:, 0].mean(0), classes, rows, scenes),
    }


def load_unet():
    """The shipped StableDiffusionPipeline, fp32."""
    folder = weights_path("stable_diffusion")
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


@torch.no_grad()
def measure(part, split, scenes):
    """One of `PARTS`."""
    if part in ("generation", "unet_generation"):
        pipeline = load_transformer() if part == "generation" else load_unet()
        return measure_generation(pipeline, load_clip(), load_classifier(), split, PER_THING)
    drawn = [render(i, split) for i in range(scenes)]
    if part == "heatmaps":
        return measure_blocks(load_transformer(), drawn)
    return measure_unet(load_unet(), drawn)


PARTS = ("heatmaps", "unet_heatmaps", "unet_generation", "generation")


def report(result):
    """The result as Markdown."""
    found = result["heatmaps"]

    def cell(scores, rule="otsu"):
        return " / ".join(f"{100 * v:.0f}" for v in scores[rule])

    def shows(generation):
        return (
            f"{generation['recognised_by_classifier']:.0%} by the classifier, "
            f"{generation['recognised_by_clip']:.0%} by CLIP"
        )

    generated = []
    if "generation" in result and "unet_generation" in result:
        generated = [
            f"Generated images whose thing is recognised, of {result['generation']['images']} "
            f"({result['sampling']['num_inference_steps']} steps, guidance "
            f"{result['sampling']['guidance_scale']:g}): transformer "
            f"{shows(result['generation'])}; UNet {shows(result['unet_generation'])}.",
            "",
        ]
    heads = " | ".join(f"{t / 1000:.2f}" for t in found["timesteps"])
    lines = [
        "# The miniature Stable Diffusion 3, measured beside the UNet",
        "",
        f"Split `{result['split']}`, {result['scenes']} scenes, {found['mentions']} mentions; "
        "written by `python -m recipes.miniature.measure_transformer`. These numbers are about "
        "the drawn world and its small models only.",
        "",
        *generated,
        "IoU (%) of attribution heatmaps with the true masks, things / stuff, of real scenes mixed "
        "with noise; masks by Otsu's threshold. Columns: the share of noise.",
    ]
    for reading in READINGS:
        part = found[reading]
        lines += ["", f"## Reading `{reading}`", "", f"| block | {heads} | all |",
                  "|---|" + "---:|" * (len(found["timesteps"]) + 1)]  # fmt: skip
        for b, row in enumerate(part["one block, one timestep"]):
            cells = [*map(cell, row), cell(part["one block, all timesteps"][b])]
            lines.append(f"| {b} | {' | '.join(cells)} |")
        cells = [*map(cell, part["all blocks, one timestep"]), cell(part["everything"])]
        lines.append(f"| all | {' | '.join(cells)} |")
        lines += [
            "",
            f"The best ranges, by Otsu's threshold and by {THRESHOLD} of the stretched map:",
            "",
            "| blocks | noise | Otsu | fixed |",
            "|---|---|---:|---:|",
        ]
        for row in part["ranges"]:
            first, last = row["blocks"][0], row["blocks"][1] - 1
            low, high = (t / 1000 for t in row["timesteps"])
            lines.append(
                f"| {first} to {last} | {low:g} to {high:g} | {cell(row)} | {cell(row, 'fixed')} |"
            )
    lines += ["", "## UNet, the 16 x 16 layers", "", f"| | {heads} | 0.10 to 0.30 | all |",
              "|---|" + "---:|" * (len(found["timesteps"]) + 2)]  # fmt: skip
    part = result["unet_heatmaps"]
    for title, rule in (("Otsu", "otsu"), ("fixed", "fixed")):
        rows = [*part["one timestep"], part["100 to 300"], part["everything"]]
        lines.append(f"| {title} | {' | '.join(cell(row, rule) for row in rows)} |")
    lines += ["", "The UNet's columns are its timesteps in thousandths; its noise schedule is "
              "another one, so a column is not the same amount of noise."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--scenes", type=int, default=80)
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="others stay as they are written"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    training = json.loads((weights_path(NAME).parent / "training.json").read_text())
    head = {
        "split": arguments.split,
        "scenes": arguments.scenes,
        "parameters": parameters_of(f"{NAME}/transformer"),
        "training": training["diffusion_transformer"],
        "sampling": SAMPLING,
    }
    name = "miniature_transformer" + f"_{arguments.split}" * (arguments.split != "test")
    path = (arguments.output / name).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        found = measure(part, arguments.split, arguments.scenes)
        # Read only now: others may have measured their parts meanwhile.
        known = json.loads(path.read_text()) if path.is_file() else {}
        same = all(known.get(key) == value for key, value in head.items())
        result = (known if same else head) | {part: found}
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{part}: done", flush=True)
    if "heatmaps" in result and "unet_heatmaps" in result:
        path.with_suffix(".md").write_text(report(result))
        print(report(result))


if __name__ == "__main__":
    main()
