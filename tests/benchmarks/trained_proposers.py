r"""Trained proposers in small: RetCLIP across data sets with an FC-CLIP trained here (tables 1 and
4), and VOCSeg with an open MaskFormer trained here (table 2, eq. 4's beta).

    python tests/benchmarks/trained_proposers.py --runs runs/trained_proposers

Trains what is missing (`configs/miniature_{fcclip,mask_former}.yaml`; a stopped training is
resumed), builds the two collections, chooses parameters on validation scenes and measures on test
scenes: `results/trained_proposers.{json,md}`. `--full-size` makes one real step of the two papers'
configurations with random weights instead, and records its time and memory.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import commit, processor
from ovref.config import load
from ovref.evaluation.report import markdown_table
from ovref.miniature.shapes import UNSEEN
from ovref.training.methods import module_of
from ovref_inference.collection import format as fmt
from ovref_inference.proposers.config import FcClipConfig, MaskFormerConfig
from ovref_pipelines import recipe
from ovref_pipelines.verbs import train as verb
from paper_tables.datasets import Dataset, miniature_scenes, with_unseen
from paper_tables.parts import Parts
from paper_tables.predictions import evaluate_predictions, single_metric
from paper_tables.published import RETCLIP_WEIGHTS
from paper_tables.report import Ordering, markdown, table
from paper_tables.spec import Collections, Proposers, TablesSpec
from paper_tables.tables import OPTIONS
from paper_tables.tune import coordinate_search

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import full_size

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TRAININGS = {"fcclip": "miniature_fcclip", "open_mask_former": "miniature_mask_former"}
BUILDS = {
    # One CLIP for masks, classes and database.
    "retclip": ("miniature_retclip", [
        "embed.visual.model=miniature:clip_convnext", "embed.visual.features=tokens",
        "embed.visual.size_hw=[192, 192]", "embed.text.model=miniature:clip_convnext",
    ]),
    "vocseg": ("miniature_vocseg", []),
}  # fmt: skip
PANOPTIC = ("pq", "sq", "rq", "ap", "miou", "seen", "unseen", "hiou")
PIXELS = ("miou", "pixel_accuracy", "seen", "unseen", "hiou")
FREE, TRAINED, OPEN = "grounded_sam", "fcclip", "open_mask_former"


def say(line: str) -> None:
    print(line, flush=True)


def trained(runs: Path) -> dict[str, dict[str, Any]]:
    """Trains what is not finished; steps, seconds and last losses of both."""
    found = {}
    for name, config in TRAININGS.items():
        spec = verb.read(ROOT / f"configs/{config}.yaml", [f"output={runs / name}"]).spec
        file = runs / name / ("fcclip.json" if name == "fcclip" else "config.json")
        if not file.is_file():
            module_of(spec).run(spec, say)
        tree = json.loads(file.read_text())
        facts = tree["training"] if name == "fcclip" else tree["open_classes"]["training"]
        found[name] = {k: facts[k] for k in ("steps", "seconds", "data", "last")}
    return found


def built(runs: Path) -> dict[str, str]:
    """Builds the collections that are not there."""
    found = {}
    for name, (config, overrides) in BUILDS.items():
        given = [f"output={runs / name}", "engine.engine=local", "engine.workers=1", *overrides]
        settings = load(recipe.BuildConfig, ROOT / f"configs/{config}.yaml", given)
        store = recipe.output_of(settings).collection
        if not store.exists(fmt.MANIFEST):
            say(f"building {name}")
            recipe.build(settings, say)
        found[name] = str(store.url)
    return found


def tables_spec(runs: Path, places: dict[str, str]) -> TablesSpec:
    """What `Parts` needs to know."""
    return TablesSpec(
        output=str(runs / "tables"),
        collections=Collections(
            fossil="", vocseg_binary=places["vocseg"], vocseg_heatmap="", vocseg_none="",
            retclip=places["retclip"],
        ),
        proposers=Proposers(
            fcclip=FcClipConfig(model=str(runs / "fcclip"), short_side=192, long_side=192),
            open_mask_former=MaskFormerConfig(model=str(runs / OPEN), min_score=0.0),
        ),
    )  # fmt: skip


def chosen_on(parts: Parts, data: Dataset) -> dict[str, Any]:
    """Parameters from validation scenes, one after the other: PQ decides for RetCLIP, mIoU for
    VOCSeg. Alpha and beta are those of the trained proposers; tau, gamma and k of each proposer."""

    def best(predict: Any, metric: str, config: Any, options: dict[str, Any]) -> Any:
        def score(tried: Any) -> float:
            return single_metric(data, predict(tried), metric)

        return coordinate_search(config, options, score, lambda line: None)

    start = parts.spec.segmenters
    shared = {name: OPTIONS["retclip"][name] for name in ("tau", "gamma", "k")}
    weights = {name: (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) for name in ("alpha", "beta")}
    free = best(lambda c: parts.retclip(data, c, FREE), "pq", start.retclip, shared)
    fcclip = best(
        lambda c: parts.retclip(data, c, TRAINED), "pq", free, shared | weights
    )
    options = OPTIONS["vocseg"] | {"beta": (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)}
    vocseg = best(lambda c: parts.vocseg(data, c, OPEN), "miou", start.vocseg, options)
    return {"free": free, "fcclip": fcclip, "vocseg": vocseg}


def retclip_tables(parts: Parts, data: Dataset, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Tables 1 and 4, and the trained proposer beside the training-free one."""

    def row(proposals: str = TRAINED, **changes: Any) -> Any:
        config = replace(chosen["free" if proposals == FREE else "fcclip"], **changes)
        return evaluate_predictions(data, parts.retclip(data, config, proposals))

    whole = row()
    rows = {
        "training-free RetCLIP": row(FREE),
        "FC-CLIP": row(fusion="geometric", gamma=0.0, alpha=0.4, beta=0.8),
        "RetCLIP": whole,
        "CLIP alone": row(gamma=0.0, alpha=1.0, beta=1.0),
        "retrieval alone": row(gamma=1.0, alpha=1.0, beta=1.0),
        "in-vocabulary alone": row(alpha=0.0, beta=0.0),
        "without retrieval": row(gamma=0.0),
        "without CLIP's text": row(gamma=1.0),
    }
    say(str({name: one.metrics for name, one in rows.items()}))

    def ordering(better: str, worse: str, metric: str, paper: str) -> Ordering:
        key = f"{better}_{worse}_{metric}".replace(" ", "_").replace("'", "").lower()
        return Ordering(key=key, better=better, worse=worse, metric=metric, paper=paper)

    goal = "(goal)"
    first = table(
        "retclip_trained",
        "RetCLIP across data sets",
        "RetCLIP, table 1: FC-CLIP's fusion of its own two classifiers, and RetCLIP's of three, "
        "with the database of the same CLIP. Below, the parts of the ensemble, on the same masks. "
        "Training-free: GroundingDINO and SAM propose.",
        rows,
        PANOPTIC,
        [
            ordering("RetCLIP", "FC-CLIP", "pq", "PQ 30.9 above 26.4 (ADE20k)"),
            ordering("RetCLIP", "FC-CLIP", "miou", "mIoU 44.0 above 34.0 (ADE20k)"),
            ordering("RetCLIP", "training-free RetCLIP", "seen", goal),
            ordering("RetCLIP", "training-free RetCLIP", "pq", "PQ 30.9 above 16.1 (ADE20k)"),
            *(
                ordering("RetCLIP", other, metric, goal)
                for other in ("CLIP alone", "retrieval alone", "in-vocabulary alone")
                for metric in ("pq", "miou")
            ),
            ordering("RetCLIP", "without retrieval", "pq", "PQ 30.9 above 26.4 (ADE20k)"),
            ordering("RetCLIP", "without CLIP's text", "pq", "PQ 30.9 above 25.4 (ADE20k)"),
        ],
    )

    def name(weights: tuple[float, ...]) -> str:
        return "{}, {}, {}".format(*weights)

    fourth = {
        name(weights): row(**dict(zip(("alpha", "beta", "gamma"), weights, strict=True)))
        for weights in RETCLIP_WEIGHTS
    }
    best = name((0.4, 0.7, 0.3))
    second = table(
        "retclip_trained_weights",
        "RetCLIP across data sets: alpha, beta, gamma",
        "RetCLIP, table 4, with the same FC-CLIP.",
        fourth,
        ("pq", "miou", "seen", "unseen", "hiou"),
        [
            Ordering(key=f"trained_weights_{key}", better=best, worse=name(weights), metric="pq",
                     paper=f"PQ 30.9 above {pq} (ADE20k)")
            for weights, (key, pq) in {
                (1.0, 1.0, 0.3): ("trained", 24.8),
                (0.4, 0.7, 0.0): ("retrieval", 26.4),
                (0.4, 0.7, 1.0): ("clip", 25.4),
            }.items()
        ],
    )  # fmt: skip
    return [first, second]


def vocseg_tables(parts: Parts, data: Dataset, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Table 2 and eq. 4 with the open MaskFormer."""

    def row(proposals: str = OPEN, **changes: Any) -> Any:
        config = replace(chosen["vocseg"], **changes)
        return evaluate_predictions(data, parts.vocseg(data, config, proposals))

    rows = {
        "VOCSeg": row(),
        "without MaskFormer's classes": row(beta=1.0),
        "MaskFormer's classes alone": row(beta=0.0),
        "text": row(alpha=0.0),
        "visual": row(alpha=1.0),
        "text, without MaskFormer's classes": row(alpha=0.0, beta=1.0),
        "visual, without MaskFormer's classes": row(alpha=1.0, beta=1.0),
        "MaskFormer of trained classes": row("trained"),
    }
    say(str({name: one.metrics for name, one in rows.items()}))
    paper = "(goal)"
    pairs = [
        ("VOCSeg", "without MaskFormer's classes", "miou", paper),
        ("VOCSeg", "without MaskFormer's classes", "seen", paper),
        ("VOCSeg", "without MaskFormer's classes", "unseen", paper),
        ("VOCSeg", "MaskFormer's classes alone", "miou", paper),
        ("VOCSeg", "text", "miou", "22.5 above 21.0 (ADE-150), 93.4 above 92.6 (PAS-20)"),
        ("VOCSeg", "visual", "miou", "22.5 above 20.1 (ADE-150), 93.4 above 93.2 (PAS-20)"),
        ("VOCSeg", "MaskFormer of trained classes", "miou", paper),
    ]
    first = table(
        "vocseg_open",
        "VOCSeg with an open MaskFormer",
        "VOCSeg, table 2, with p-hat of every class (eq. 4). `text` has alpha 0, `visual` alpha 1.",
        rows,
        PIXELS,
        [
            Ordering(key=f"vocseg_open_{number}", better=a, worse=b, metric=metric, paper=text)
            for number, (a, b, metric, text) in enumerate(pairs)
        ],
    )
    betas = (0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    second = table(
        "vocseg_open_beta",
        "Eq. 4's beta with the open MaskFormer",
        "VOCSeg, eq. 4, whose beta is 0.7 on ADE-150 and 0.6 on PAS-20.",
        {f"beta = {beta}": row(beta=beta) for beta in betas},
        PIXELS,
    )
    return [first, second]


def measure(runs: Path, scenes: int, tuning: int, reasons: dict[str, str]) -> None:
    """Everything on the miniature; writes the results."""
    trainings, places = trained(runs), built(runs)
    spec = tables_spec(runs, places)
    test = with_unseen(miniature_scenes("test", scenes), UNSEEN)
    validation = miniature_scenes("validation", tuning)
    with Parts(spec, [validation], "cpu") as parts:
        chosen = chosen_on(parts, validation)
        say(str(chosen))
    with Parts(spec, [test], "cpu") as parts:
        tables = [*retclip_tables(parts, test, chosen), *vocseg_tables(parts, test, chosen)]
        counts = {name: len(parts.collection(place)) for name, place in places.items()}
    free, fcclip, vocseg = chosen["free"], chosen["fcclip"], chosen["vocseg"]
    facts = [
        f"Measured on {test.name}; parameters chosen on {tuning} validation scenes; one seed. "
        f"Unseen in training: {', '.join(UNSEEN)}.",
        *(
            f"{name}: {one['steps']} steps on {one['data']}, {one['seconds']:.0f} s of one thread "
            "on a shared machine."
            for name, one in trainings.items()
        ),
        "References: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + ".",
        f"RetCLIP: tau {fcclip.tau}, gamma {fcclip.gamma}, k {fcclip.k}, alpha {fcclip.alpha}, "
        f"beta {fcclip.beta}; training-free tau {free.tau}, gamma {free.gamma}, k {free.k}.",
        f"VOCSeg: alpha {vocseg.alpha}, beta {vocseg.beta}, tau {vocseg.tau}, k {vocseg.k}.",
        f"Commit {commit()}; {processor()}.",
        "`python tests/benchmarks/trained_proposers.py --runs runs/trained_proposers`",
    ]
    document = {
        "title": "Trained proposers in small",
        "caption": "Measured on the miniature: these numbers say nothing about the real models.",
        "facts": facts, "tables": tables, "pictures": {}, "trainings": trainings,
    }  # fmt: skip
    known = _known()
    (RESULTS / "trained_proposers.json").write_text(
        json.dumps(document | {"full_size": known.get("full_size", [])}, indent=1) + "\n"
    )
    _write_page(reasons)


def full_size_steps(only: str) -> None:
    """One image through each of the papers' configurations, forward and backward."""
    found = []
    for name in ("fcclip_coco", "mask_former_coco_stuff"):
        if only not in ("", name):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            given = [f"data.root={full_size.write_coco(place / 'coco')}", "device=cpu",
                     f"output={place / 'out'}"]  # fmt: skip
            if name == "fcclip_coco":
                given += [f"network.model={full_size.write_convnext_large(place / 'clip')}"]
            else:
                clip = full_size.write_clip(place / "clip", 768, full_size.SMALL_VISION)
                swin = full_size.write_swin_base(place / "swin")
                given += [f"network.model={clip}", f"network.start.model={swin}"]
            spec = verb.read(ROOT / f"configs/{name}.yaml", given).spec
            began = time.process_time()
            said = module_of(spec).check(spec).splitlines()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found.append({
            "configuration": name, "said": said, "cpu_seconds": round(time.process_time() - began),
            "peak_gib": round(peak, 1), "commit": commit(), "machine": processor(),
        })  # fmt: skip
        say(str(found[-1]))
    known = _known()
    others = [one for one in known.get("full_size", [])
              if one["configuration"] not in [each["configuration"] for each in found]]  # fmt: skip
    known["full_size"] = sorted([*others, *found], key=lambda one: one["configuration"])
    (RESULTS / "trained_proposers.json").write_text(json.dumps(known, indent=1) + "\n")
    if "tables" in known:
        _write_page({})


def _known() -> dict[str, Any]:
    path = RESULTS / "trained_proposers.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_page(reasons: dict[str, str]) -> None:
    known = _known()
    rows = [
        [one["configuration"], one["said"][2], one["said"][-1].partition(";")[0],
         str(one["cpu_seconds"]), str(one["peak_gib"])]
        for one in known["full_size"]
    ]  # fmt: skip
    page = markdown(known, reasons)
    if rows:
        columns = ["configuration", "trained", "step", "CPU seconds in all", "peak GiB"]
        page += "\n## One real step at full size\n\nRandom weights, one image.\n\n"
        page += "\n".join(markdown_table(columns, rows)) + "\n"
    (RESULTS / "trained_proposers.md").write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/trained_proposers"))
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--tuning", type=int, default=100)
    parser.add_argument("--full-size", nargs="?", const="", metavar="CONFIGURATION")
    parser.add_argument("--only", choices=("train", "build"), help="this, and nothing else")
    arguments = parser.parse_args()
    runs = arguments.runs.absolute()
    if arguments.full_size is not None:
        full_size_steps(arguments.full_size)
    elif arguments.only == "train":
        say(str(trained(runs)))
    elif arguments.only == "build":
        say(str(built(runs)))
    else:
        measure(runs, arguments.scenes, arguments.tuning, REASONS)


REASONS: dict[str, str] = {}
"""What people found out about an ordering that is not as in the paper, by its key."""

if __name__ == "__main__":
    main()
