"""The metrics against the original packages' own functions, on random maps with every edge case.

    python tests/benchmarks/original_metrics.py --mmseg FOLDER --panopticapi FOLDER \
        --boundary FOLDER [--images 400] [--output tests/benchmarks/results]

The folders are those of the packages, unpacked anywhere: mmsegmentation's wheel (1.2.2), clones of
cocodataset/panopticapi and of bowenc0221/boundary-iou-api. pycocotools is installed with the tests.
Nothing of them is part of this project. mmsegmentation's metric is loaded without mmengine and
mmcv, of which its arithmetic uses nothing: the names that its module imports are stand-ins. It adds
up in 32-bit floats, which hold whole numbers up to 16.7 million exactly; the maps here stay below.

Classes: 3, 21, 150, 459 and 847. Among the images are some of one pixel, some all void, some whose
prediction has none of the true classes, some predicted without a class, and some that are right.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovref.evaluation.metrics_ap import (
    AveragePrecision,
    TrueInstances,
    match_detections,
)
from ovref.evaluation.metrics_panoptic import VOID, PanopticQuality, TruePanoptic
from ovref.evaluation.metrics_semantic import (
    IGNORE,
    boundary_hw,
    confusion,
    scores_of_counts,
    sparse_confusion,
    split_scores,
)
from ovref_inference.segmenters.instances import Instances

CLASSES = (3, 21, 150, 459, 847)
SIZES = ((1, 1), (7, 5), (48, 64), (64, 96))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mmseg", type=Path, required=True)
    parser.add_argument("--panopticapi", type=Path, required=True)
    parser.add_argument("--boundary", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = [
        *semantic_rows(mmseg_metric(arguments.mmseg), arguments.images),
        *panoptic_rows(arguments.panopticapi, arguments.images),
        *boundary_rows(arguments.boundary, arguments.images),
        *ap_rows(arguments.images),
    ]
    results = {"machine": platform.machine(), "numpy": np.__version__, "rows": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "original_metrics"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))
    print(report(results))
    if any(row["largest_difference"] for row in rows):
        raise SystemExit(1)


def loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mmseg_metric(folder):
    """The class IoUMetric, whose two static methods are its arithmetic."""
    for name in ("mmengine", "mmengine.dist", "mmengine.evaluator", "mmengine.logging",
                 "mmengine.utils", "mmseg", "mmseg.registry", "prettytable"):  # fmt: skip
        sys.modules[name] = MagicMock()
    sys.modules["mmengine.evaluator"].BaseMetric = object
    sys.modules["mmseg.registry"].METRICS = types.SimpleNamespace(
        register_module=lambda: lambda cls: cls
    )
    path = folder / "mmseg" / "evaluation" / "metrics" / "iou_metric.py"
    return loaded("iou_metric", path).IoUMetric


def semantic_maps(rng, classes):
    """Truth with IGNORE and prediction with -1, of one image."""
    size_hw = SIZES[rng.integers(len(SIZES))]
    some = np.concatenate([rng.choice(classes, min(classes, 6), replace=False), [classes - 1]])
    truth_hw = rng.choice([*some, IGNORE], size_hw)
    kind = rng.integers(6)
    predicted_hw = np.where(rng.random(size_hw) < 0.6, truth_hw, rng.choice([*some, -1], size_hw))
    if kind == 0:
        truth_hw = np.full(size_hw, IGNORE)
    elif kind == 1:
        predicted_hw = np.full(size_hw, -1)
    elif kind == 2:
        predicted_hw = np.full(size_hw, rng.integers(classes))
    elif kind == 3:
        predicted_hw = np.where(truth_hw == IGNORE, some[0], truth_hw)
    return truth_hw.astype(np.int32), predicted_hw.astype(np.int32)


def largest(ours, theirs):
    """The largest difference; infinite where only one is defined."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if (np.isnan(ours) != np.isnan(theirs)).any():
        return float("inf")
    return float(np.nanmax(np.abs(ours - theirs), initial=0.0))


def semantic_rows(metric, images):
    rows = []
    for classes in CLASSES:
        rng = np.random.default_rng(classes)
        counts, areas = np.zeros((classes, classes + 1), np.int64), []
        for _ in range(images):
            truth_hw, predicted_hw = semantic_maps(rng, classes)
            counts += confusion(truth_hw, predicted_hw, classes)
            own = np.zeros_like(counts)
            true, said, pixels = sparse_confusion(truth_hw, predicted_hw, classes).T
            own[true, said] = pixels
            theirs = metric.intersect_and_union(
                torch.from_numpy(predicted_hw), torch.from_numpy(truth_hw), classes, IGNORE
            )
            areas.append(theirs)
        totals = [sum(each).double() for each in zip(*areas, strict=True)]
        theirs = metric.total_area_to_metrics(*totals)
        scores = scores_of_counts(counts)
        seen = np.arange(classes) % 3 > 0
        split = split_scores(scores.iou, seen)
        first, second = (np.nanmean(theirs["IoU"][which]) for which in (seen, ~seen))
        for name, ours, other in (
            ("IoU of each class", scores.iou, theirs["IoU"]),
            ("accuracy of each class", scores.accuracy, theirs["Acc"]),
            ("mIoU", scores.miou, np.nanmean(theirs["IoU"])),
            ("mAcc", scores.mean_accuracy, np.nanmean(theirs["Acc"])),
            ("aAcc", scores.pixel_accuracy, theirs["aAcc"]),
            ("hIoU", split.hiou, 2 * first * second / (first + second)),
        ):
            rows.append(row("mmsegmentation 1.2.2", name, images, classes, largest(ours, other)))
    return rows


def random_segments(rng, size_hw, classes, crowds):
    """A panoptic map of rectangles over void."""
    ids_hw, labels = np.zeros(size_hw, np.int32), {}
    for id_ in range(1, 1 + rng.integers(7)):
        top, left = (rng.integers(side) for side in size_hw)
        height, width = (rng.integers(1, side + 1) for side in size_hw)
        ids_hw[top : top + height, left : left + width] = id_
        labels[id_] = int(rng.integers(classes))
    labels = {id_: label for id_, label in labels.items() if (ids_hw == id_).any()}
    crowd = {id_ for id_ in labels if crowds and rng.random() < 0.2}
    return TruePanoptic(ids_hw=ids_hw, labels=labels, crowd=frozenset(crowd))


def nudged(rng, truth, classes):
    """A prediction that is often close: the truth shifted, some labels and segments changed."""
    ids_hw = np.roll(truth.ids_hw, rng.integers(-1, 2), axis=int(rng.integers(2)))
    present = set(np.unique(ids_hw).tolist()) - {VOID}
    labels = {
        id_: truth.labels[id_] if rng.random() < 0.8 else int(rng.integers(classes))
        for id_ in present
    }
    return TruePanoptic(ids_hw=ids_hw, labels=labels)


def panoptic_rows(folder, images):
    sys.path.insert(0, str(folder))
    from panopticapi.evaluation import pq_compute_single_core

    rows = []
    for classes in (3, 133, 150):
        rng = np.random.default_rng(classes)
        things = [bool(label % 2) for label in range(classes)]
        categories = {i: {"id": i, "isthing": int(things[i])} for i in range(classes)}
        quality = PanopticQuality(things)
        with tempfile.TemporaryDirectory() as place:
            pairs = []
            for number in range(images):
                size_hw = SIZES[number % len(SIZES)]
                truth = random_segments(rng, size_hw, classes, crowds=True)
                close = number % 3 < 2
                found = (
                    nudged(rng, truth, classes) if close
                    else random_segments(rng, size_hw, classes, crowds=False)
                )  # fmt: skip
                quality.add(truth, found)
                pairs.append([written(place, number, one, kind)
                              for one, kind in ((truth, "true"), (found, "own"))])  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                stat = pq_compute_single_core(0, pairs, place, place, categories)
        ours = quality.scores()
        for name, isthing, own in (
            ("all", None, ours.all), ("things", True, ours.things), ("stuff", False, ours.stuff)
        ):  # fmt: skip
            theirs, per_class = stat.pq_average(categories, isthing)
            values = ([own.pq, own.sq, own.rq], [theirs[key] for key in ("pq", "sq", "rq")])
            rows.append(row("panopticapi", f"PQ, SQ, RQ of {name}", images, classes,
                            largest(*values)))  # fmt: skip
            if isthing is None:
                each = [per_class[i]["pq"] for i in range(classes)]
                rows.append(row("panopticapi", "PQ of each class", images, classes,
                                largest(np.nan_to_num(ours.pq), each)))  # fmt: skip
    return rows


def written(folder, number, panoptic, kind):
    """A PNG of segment ids and what the JSON file would say of it."""
    ids_hw = panoptic.ids_hw
    colour_hwc = np.stack([ids_hw % 256, ids_hw // 256, ids_hw // 65536], axis=2).astype(np.uint8)
    name = f"{number}_{kind}.png"
    Image.fromarray(colour_hwc).save(Path(folder) / name)
    segments = [
        {"id": id_, "category_id": label, "iscrowd": int(id_ in panoptic.crowd),
         "area": int((ids_hw == id_).sum())}
        for id_, label in panoptic.labels.items()
    ]  # fmt: skip
    return {"file_name": name, "image_id": number, "segments_info": segments}


def boundary_rows(folder, images):
    module = loaded("boundary_utils", folder / "boundary_iou" / "utils" / "boundary_utils.py")
    rng, different = np.random.default_rng(0), 0
    for number in range(images):
        size_hw = (*SIZES, (240, 320), (1, 90))[number % 6]
        mask_hw = np.zeros(size_hw, bool)
        for _ in range(rng.integers(4)):
            top, left = (rng.integers(side) for side in size_hw)
            mask_hw[top : top + rng.integers(1, 80), left : left + rng.integers(1, 80)] = True
        mask_hw ^= rng.random(size_hw) < rng.choice([0.0, 0.02])
        theirs_hw = module.mask_to_boundary(mask_hw.astype(np.uint8), 0.02).astype(bool)
        different += int((theirs_hw != boundary_hw(mask_hw, 0.02)).sum())
    return [row("boundary-iou-api", "pixels of boundaries", images, 1, float(different))]


def random_instances(rng, size_hw, classes, count):
    masks = np.zeros((count, *size_hw), bool)
    for mask_hw in masks:
        top, left = (rng.integers(side) for side in size_hw)
        mask_hw[top : top + rng.integers(1, 40), left : left + rng.integers(1, 40)] = True
    return masks, rng.integers(classes, size=count)


def ap_rows(images):
    rows = []
    for classes in (3, 80, 100):
        rng = np.random.default_rng(classes)
        average, truths, found = AveragePrecision(classes), [], []
        for number in range(images):
            size_hw = SIZES[number % len(SIZES)]
            masks, labels = random_instances(rng, size_hw, classes, rng.integers(6))
            crowd = rng.random(len(labels)) < 0.15
            kept = rng.random(len(labels)) < 0.7
            more, more_labels = random_instances(rng, size_hw, classes, rng.integers(4))
            moved = np.roll(masks[kept], rng.integers(-1, 2), axis=1)
            own = np.concatenate([moved, more])
            own_labels = np.concatenate([labels[kept], more_labels])
            scores = rng.choice(np.linspace(0.05, 1, 12), len(own))
            for matched in match_detections(
                TrueInstances(masks_nhw=masks, labels=labels, crowd=crowd),
                Instances(masks_nhw=own, labels=own_labels, scores=scores),
            ):
                average.add_matched(matched)
            truths.append((number, size_hw, masks, labels, crowd))
            found.append((number, own, own_labels, scores))
        theirs = official_ap(truths, found, classes)
        ours = average.scores()
        rows.append(row("pycocotools", "AP, AP50, AP75", images, classes,
                        largest([ours.ap, ours.ap50, ours.ap75], theirs[:3])))  # fmt: skip
        rows.append(row("pycocotools", "AP of each class", images, classes,
                        largest(ours.per_class, theirs[3])))  # fmt: skip
    return rows


def official_ap(truths, found, classes):
    annotations, results = [], []
    for number, _, masks, labels, crowd in truths:
        for mask_hw, label, is_crowd in zip(masks, labels, crowd, strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": int(label),
                "segmentation": encoded(mask_hw), "area": float(mask_hw.sum()),
                "iscrowd": int(is_crowd), "bbox": [0, 0, 1, 1],
            })  # fmt: skip
    for number, masks, labels, scores in found:
        for mask_hw, label, score in zip(masks, labels, scores, strict=True):
            results.append({
                "image_id": number, "category_id": int(label), "score": float(score),
                "segmentation": encoded(mask_hw),
            })  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": n, "height": hw[0], "width": hw[1]} for n, hw, *_ in truths],
            "annotations": annotations,
            "categories": [{"id": i, "name": str(i)} for i in range(classes)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    per_class = np.array([np.mean(precision[:, :, c]) for c in range(classes)])
    per_class[per_class == -1] = np.nan
    known = precision[:, :, precision[0, 0] > -1]
    return known.mean(), known[0].mean(), known[5].mean(), per_class


def encoded(mask_hw):
    code = rle.encode(np.asfortranarray(mask_hw.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def row(package, metric, images, classes, difference):
    # What is below is the last bit of a float64, for sums in another order.
    return {"package": package, "metric": metric, "images": images, "classes": classes,
            "largest_difference": 0.0 if difference < 1e-12 else difference}  # fmt: skip


def report(results):
    lines = [
        "# Metrics and their originals",
        "",
        "The metrics of `ovref.evaluation` and the original packages' own functions on the same "
        "random maps: the largest difference of any value, 0 where it is below 1e-12 (sums in "
        "another order). `tests/benchmarks/original_metrics.py`, which made this, says how.",
        "",
        "| original | metric | images | classes | largest difference |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {one['package']} | {one['metric']} | {one['images']} | {one['classes']} | "
        f"{one['largest_difference']:g} |"
        for one in results["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
