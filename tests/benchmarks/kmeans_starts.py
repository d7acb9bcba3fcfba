"""How often k-means should start over what FOSSIL retrieves, and which N, K and gamma the demo has.

    python tests/benchmarks/kmeans_starts.py demo runs/demo/collection validation
    python tests/benchmarks/kmeans_starts.py demo runs/demo/collection test

Each scene of the miniature is encoded once; prototypes of every setting are then compared with the
same features under the same masks (OpenCut's). Adds to
results/kmeans_starts.json and kmeans_starts.md: mIoU over several seeds of k-means, the difference
of ten starts from one with the interval of a paired bootstrap over the scenes, and the settings
that are best on validation scenes.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovref.evaluation import miniature
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.compare import bootstrap_times, miou_of_samples
from ovref.evaluation.methods import Methods
from ovref.evaluation.report import markdown_table
from ovref.evaluation.spec import EvaluateSpec
from ovref.evaluation.totals import Overlaps
from ovref_inference.collection.clustering import spherical_kmeans
from ovref_inference.collection.prototypes import Prototypes, stacked
from ovref_inference.encoders.pooling import pool_regions
from ovref_inference.segmenters.fossil import FossilSegmenter, prototype_scores
from ovref_inference.segmenters.windows import resize_scores

RESULTS = Path(__file__).parent / "results"
NS = (5, 10, 20, 40)
KS = (1, 3, 5, 10, 20)
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
STARTS = (1, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the collection, in the tables")
    parser.add_argument("collection")
    parser.add_argument("split", choices=("validation", "test"))
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n", type=int, nargs="+", default=NS, help="others stay as they were")
    options = parser.parse_args()
    started = time.process_time()
    rows = measure(options.collection, options.split, options)
    path = RESULTS / "kmeans_starts.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    document |= {"scenes": options.scenes, "seeds": options.seeds}
    splits = document.setdefault("collections", {}).setdefault(options.name, {})
    kept = splits.get(options.split, {"cpu_seconds": 0, "rows": []})
    splits[options.split] = {
        "cpu_seconds": kept["cpu_seconds"] + round(time.process_time() - started),
        "rows": sorted(
            [one for one in kept["rows"] if one["n"] not in options.n] + rows,
            key=lambda one: (one["n"], one["k"], one["gamma"]),
        ),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "kmeans_starts.md").write_text(page(document))


def settings(n: int, k: int, seeds: int) -> list[tuple[int, int]]:
    """(starts, seed) that can differ: one cluster, or one a reference, is always the same."""
    return [(1, 0)] if k == 1 or k >= n else list(itertools.product(STARTS, range(seeds)))


def measure(folder: str, split: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each N, K and gamma, of one collection on one split."""
    spec = EvaluateSpec(
        collection=folder, output="-", split=split, scenes=options.scenes, rows=("fossil",)
    )
    with CachedModels("cpu") as models:
        data = spec.open_data()
        methods = Methods(spec, data, models)
        examples = list(data)
        scenes = []
        for start in range(0, len(examples), 32):
            methods.encode_batch(examples[start : start + 32])
            scenes += [encoded(methods, one.image_hwc) for one in examples[start : start + 32]]
        segmenter = methods.fossil(miniature.FOSSIL)
        asked = methods.names
        rows, checked = [], False
        for n, k in itertools.product(options.n, KS):
            if k > n:
                continue
            runs = {}
            for starts, seed in settings(n, k, options.seeds):
                prototypes, cosine = clustered(segmenter, asked, n, k, starts, seed)
                overlaps = labelled(scenes, examples, prototypes)
                runs[starts, seed] = cosine, overlaps
                if not checked:
                    check(segmenter, asked, prototypes, scenes, examples)
                    checked = True
            rows += [row(n, k, gamma, runs, place) for place, gamma in enumerate(GAMMAS)]
            print(split, n, k, [round(100 * r["miou"][-1], 1) for r in rows[-5:]], flush=True)
    return rows


def encoded(methods: Methods, image_hwc: np.ndarray) -> dict[str, np.ndarray]:
    """Features of an image's patches and regions, the region of each pixel, and what weight each
    patch has at each pixel that no region covers."""
    (features_hwd,) = methods.visual.encode([image_hwc])
    (masks_nhw,) = methods.proposers["opencut"]()([image_hwc])
    masks_nhw = masks_nhw[masks_nhw.any((1, 2))]
    h, w, d = features_hwd.shape
    region_hw = np.full(image_hwc.shape[:2], -1, dtype=np.int64)
    for number, mask_hw in enumerate(masks_nhw):
        region_hw[mask_hw] = number
    rows = features_hwd.reshape(-1, d)
    if len(masks_nhw):
        rows = np.concatenate([rows, pool_regions(features_hwd, masks_nhw)[0]])
    each = torch.eye(h * w).reshape(h * w, h, w)
    weights = resize_scores(each, region_hw.shape)[:, torch.from_numpy(region_hw < 0)]
    return {"rows": rows, "region": region_hw, "weights": weights.T.contiguous().numpy()}


def clustered(
    segmenter: FossilSegmenter, names: tuple[str, ...], n: int, k: int, starts: int, seed: int
) -> tuple[Prototypes, float]:
    """Prototypes, and the mean cosine of a retrieved reference to its nearest one."""
    collection = segmenter.collection
    texts_cd = segmenter.texts(names)
    support = segmenter.prepare(names).support
    per_class, cosines = [], []
    for ids in collection.search_text(texts_cd, n).ids:
        vectors = np.asarray(collection.visual[ids[ids >= 0]], dtype=np.float32)
        centroids = spherical_kmeans(vectors, k, seed=seed, starts=starts)
        per_class.append(centroids)
        lengths = np.linalg.norm(vectors, axis=1)
        cosines.append(((vectors @ centroids.T).max(1) / lengths).mean())
    vectors_nkd, counts = stacked(per_class, collection.manifest.visual.dim)
    prototypes = Prototypes(vectors_nkd=vectors_nkd, counts=counts, nouns=((),) * len(counts))
    return prototypes.supported(support), float(np.mean(cosines))


def labelled(scenes: list[dict], examples: list, prototypes: Prototypes) -> list[Overlaps]:
    """What each scene adds to the IoU of each class, for each gamma.

    A pixel's score is linear in the mean and the maximum over prototypes (eq. 5), so that both come
    to pixels once for all gammas.
    """
    classes = len(prototypes.counts)
    rows = np.concatenate([scene["rows"] for scene in scenes])
    stops = np.cumsum([len(scene["rows"]) for scene in scenes])[:-1]
    ends = [np.split(prototype_scores(rows, prototypes, gamma), stops) for gamma in (0.0, 1.0)]
    counts = np.zeros((len(GAMMAS), len(scenes), classes, classes), dtype=np.int64)
    for place, (scene, one) in enumerate(zip(scenes, examples, strict=True)):
        region_hw, weights = scene["region"], scene["weights"]
        patches = weights.shape[1]
        truth_hw = one.label_hw.astype(np.int64) * classes
        truth = truth_hw[region_hw >= 0], truth_hw[region_hw < 0]
        mean, best = ((part[place][patches:], weights @ part[place][:patches]) for part in ends)
        for number, gamma in enumerate(GAMMAS):
            regions, others = (
                ((1 - gamma) * a + gamma * b).argmax(1) for a, b in zip(mean, best, strict=True)
            )
            found = [truth[0] + regions[region_hw[region_hw >= 0]], truth[1] + others]
            pairs = np.bincount(np.concatenate(found), minlength=classes * classes)
            counts[number, place] = pairs.reshape(classes, classes)
    right = np.einsum("gncc->gnc", counts)
    true, predicted = counts.sum(3), counts.sum(2)
    return [
        Overlaps(right=right[g], either=true[g] + predicted[g] - right[g], true=true[g])
        for g in range(len(GAMMAS))
    ]


def check(
    segmenter: FossilSegmenter, names: tuple[str, ...], prototypes: Prototypes,
    scenes: list[dict], examples: list,
) -> None:  # fmt: skip
    """The shortcut above finds as many pixels right as the segmenter's own labels, but for ties."""
    if not prototypes.counts.all():
        raise ValueError("a class without support: the shortcut is of classes that all have some")
    kept = segmenter._prepared[names]
    segmenter._prepared[names] = prototypes
    own = segmenter.segment([one.image_hwc for one in examples[:20]], names)
    segmenter._prepared[names] = kept
    right = [(a.labels_hw == b.label_hw).sum() for a, b in zip(own, examples[:20], strict=True)]
    short = labelled(scenes[:20], examples[:20], prototypes)[GAMMAS.index(segmenter.config.gamma)]
    if np.abs(short.right.sum(1) - right).max() > 4:
        raise ValueError("the shortcut gives other labels than FossilSegmenter")


def row(n: int, k: int, gamma: float, runs: dict, place: int) -> dict[str, Any]:
    """mIoU of every seed by the number of starts, and the difference of many from one."""
    overlaps = {key: found[place] for key, (_, found) in runs.items()}
    tried = sorted({starts for starts, _ in runs})
    times_sn = bootstrap_times(len(next(iter(overlaps.values())).right))
    sampled = {key: miou_of_samples(one, times_sn) for key, one in overlaps.items()}
    scores = {
        str(starts): [float(miou_s[0]) for (s, _), miou_s in sampled.items() if s == starts]
        for starts in tried
    }
    found: dict[str, Any] = {
        "n": n, "k": k, "gamma": gamma, "seeds": scores,
        "miou": [float(np.mean(values)) for values in scores.values()],
        "cosine": [float(np.mean([c for (s, _), (c, _) in runs.items() if s == starts]))
                   for starts in tried],
    }  # fmt: skip
    if len(tried) == 2:
        means = [
            np.mean([miou_s[1:] for (s, _), miou_s in sampled.items() if s == starts], 0)
            for starts in tried
        ]
        low, high = np.quantile(means[1] - means[0], (0.025, 0.975))
        found["difference"] = [found["miou"][1] - found["miou"][0], float(low), float(high)]
    return found


def page(document: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Starts of k-means for FOSSIL",
        "",
        "*Measured on the miniature, which says nothing about the real models.*",
        "",
        f"FOSSIL with OpenCut's masks on {document['scenes']} scenes of each split, "
        f"{document['seeds']} seeds of k-means,",
        "gamma = 0.5. mIoU in %: mean over the seeds (lowest to highest). The difference of ten",
        "starts from one: of these means, with the 95 % interval of a paired bootstrap over the",
        "scenes. Cosine: of a retrieved reference to its nearest prototype, one start and ten.",
        "With K = 1 or K = N there is nothing to start. By `tests/benchmarks/kmeans_starts.py`,",
        "one thread.",
    ]
    for name, splits in document["collections"].items():
        for split, found in splits.items():
            lines += [
                "",
                f"## Collection `{name}`, {split} scenes",
                "",
                *markdown_table(
                    ["N", "K", "one start", "ten starts", "difference", "cosine"],
                    [cells(one) for one in found["rows"] if one["gamma"] == 0.5],
                ),
                "",
                f"{found['cpu_seconds']} CPU s.",
            ]
        if len(splits) == 2:
            rows = (splits[split]["rows"] for split in ("validation", "test"))
            lines += ["", f"## Settings for `{name}`", "", *settings_table(*rows)]
    return "\n".join(lines) + "\n"


def cells(one: dict[str, Any]) -> list[str]:
    shown = [
        f"{100 * mean:.1f}" + (f" ({100 * min(v):.1f} to {100 * max(v):.1f})" if len(v) > 1 else "")
        for mean, v in zip(one["miou"], one["seeds"].values(), strict=True)
    ]
    if "difference" in one:
        value, low, high = (100 * number for number in one["difference"])
        shown.append(f"{value:+.1f} ({low:+.1f} to {high:+.1f})")
    else:
        shown += ["", ""]
    return [str(one["n"]), str(one["k"]), *shown, ", ".join(f"{c:.3f}" for c in one["cosine"])]


def settings_table(validation: list[dict], test: list[dict]) -> list[str]:
    """The settings that are best on validation scenes with one start, and what was the demo's,
    beside test scenes."""
    # With one prototype gamma makes no difference.
    both = [
        pair
        for pair in zip(validation, test, strict=True)
        if pair[0]["k"] > 1 or pair[0]["gamma"] == 0.5
    ]
    both.sort(key=lambda pair: -pair[0]["miou"][0])
    former = [p for p in both[8:] if (p[0]["n"], p[0]["k"], p[0]["gamma"]) == (20, 10, 0.5)]
    return markdown_table(
        ["N", "K", "gamma", "validation", "test"],
        [
            [str(v["n"]), str(v["k"]), str(v["gamma"]) if v["k"] > 1 else "any",
             f"{100 * v['miou'][0]:.1f}", f"{100 * t['miou'][0]:.1f}"]
            for v, t in both[:8] + former
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
