"""The tables of VOCSeg and RetCLIP in small, and every segmenter side by side.

Each function measures one table on one data set with given parameters. Orderings are what the
papers found; their numbers are the papers' own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ovref.evaluation.predictions import Prediction
from paper_tables.datasets import Dataset
from paper_tables.parts import PROPOSALS, Parts
from paper_tables.predictions import Evaluation, evaluate_predictions
from paper_tables.report import Ordering, table
from paper_tables.spec import Segmenters

PIXELS = ("miou", "pixel_accuracy")
PANOPTIC = ("pq", "sq", "rq", "ap", "miou")


@dataclass(frozen=True, kw_only=True)
class TableBench:
    """What a table is measured on and with."""

    parts: Parts
    data: Dataset
    """With panoptic truth and a split of classes."""
    chosen: Segmenters
    """Parameters, chosen on other images."""

    def vocseg(
        self, proposals: str = "trained", masking: str = "binary", **changes: Any
    ) -> list[Prediction]:
        """VOCSeg with some of its parameters changed."""
        config = replace(self.chosen.vocseg, **changes)
        return self.parts.vocseg(self.data, config, proposals, masking)

    def retclip(self, proposals: str = "grounded_sam", **changes: Any) -> list[Prediction]:
        """RetCLIP with some of its parameters changed."""
        return self.parts.retclip(self.data, replace(self.chosen.retclip, **changes), proposals)

    def evaluated(self, rows: Mapping[str, list[Prediction]]) -> dict[str, Evaluation]:
        """The rows of a table."""
        return {
            name: evaluate_predictions(self.data, predictions) for name, predictions in rows.items()
        }


Measure = Callable[[TableBench], dict[str, Any]]


def vocseg_masking(bench: TableBench) -> dict[str, Any]:
    """VOCSeg, table 1."""
    rows = {
        f"{masking}{_with(proposals)}": bench.vocseg(proposals, masking)
        for proposals in ("trained", "truth")
        for masking in ("none", "heatmap", "binary")
    }
    return table(
        "vocseg_masking",
        "VOCSeg: masking strategies",
        "VOCSeg, table 1. What is around a region before CLIP sees its crop: kept, attenuated, or "
        "erased. Each strategy asks a collection embedded with the same.",
        bench.evaluated(rows),
        PIXELS,
        [
            Ordering(
                key=f"masking_{other}{'_truth' if end else ''}",
                better=f"binary{end}",
                worse=f"{other}{end}",
                metric="miou",
                paper=text,
            )
            for end in ("", _with("truth"))
            for other, text in (
                ("none", "22.5 above 17.7 (ADE-150), 93.4 above 82.5 (PAS-20)"),
                ("heatmap", "22.5 above 17.7 (ADE-150), 93.4 above 85.0 (PAS-20)"),
            )
        ],
        [
            "A true mask has no heatmap of its own, so there `heatmap` cuts the crops as `binary` "
            "does and differs in its collection alone.",
        ],
    )


def vocseg_ensemble(bench: TableBench) -> dict[str, Any]:
    """VOCSeg, table 2."""
    alpha = bench.chosen.vocseg.alpha
    weights = {"text": 0.0, "visual": 1.0, "ensemble": alpha}
    rows = {
        f"{name}{_with(proposals)}": bench.vocseg(proposals, alpha=weight)
        for proposals in ("trained", "truth")
        for name, weight in weights.items()
    }
    paper = {
        "text": "22.5 above 21.0 (ADE-150), 93.4 above 92.6 (PAS-20)",
        "visual": "22.5 above 20.1 (ADE-150), 93.4 above 93.2 (PAS-20)",
    }
    return table(
        "vocseg_ensemble",
        "VOCSeg: text, prototypes, and both",
        f"VOCSeg, table 2. The ensemble has alpha = {alpha}, chosen on validation scenes.",
        bench.evaluated(rows),
        PIXELS,
        [
            Ordering(
                key=f"vocseg_ensemble_{part}{'_truth' if end else ''}",
                better=f"ensemble{end}",
                worse=f"{part}{end}",
                metric="miou",
                paper=text,
            )
            for end in ("", _with("truth"))
            for part, text in paper.items()
        ],
    )


def vocseg_alpha(bench: TableBench) -> dict[str, Any]:
    """VOCSeg, figure 3."""
    alphas = [step / 10 for step in range(11)]
    return table(
        "vocseg_alpha",
        "VOCSeg: weight of the prototypes",
        "VOCSeg, figure 3, whose best alpha is 0.35 on ADE-150 and 0.8 on PAS-20. Chosen on "
        f"validation scenes: {bench.chosen.vocseg.alpha}.",
        bench.evaluated({f"alpha = {alpha}": bench.vocseg(alpha=alpha) for alpha in alphas}),
        PIXELS,
    )


def vocseg_k(bench: TableBench) -> dict[str, Any]:
    """VOCSeg, figure 4."""
    rows = {f"K = {k}": bench.vocseg(k=k) for k in (1, 2, 3, 5, 10, 20, 30)}
    return table(
        "vocseg_k",
        "VOCSeg: prototypes of a class",
        f"VOCSeg, figure 4. Chosen on validation scenes: {bench.chosen.vocseg.k}.",
        bench.evaluated(rows),
        PIXELS,
        [
            Ordering(
                key="vocseg_k",
                better="K = 10",
                worse="K = 1",
                metric="miou",
                paper="a peak at 10, stable beyond (figure, ADE-150 and PAS-20)",
            )
        ],
    )


def retclip_parts(bench: TableBench) -> dict[str, Any]:
    """RetCLIP, table 2."""
    gamma = bench.chosen.retclip.gamma
    weights = {"CLIP": 0.0, "retrieval": 1.0, "both": gamma}
    rows = {
        f"{name}{_with(proposals)}": bench.retclip(proposals, gamma=weight)
        for proposals in ("grounded_sam", "truth")
        for name, weight in weights.items()
    }
    paper = {
        ("retrieval", "CLIP"): ("PQ 15.8 above 10.9", "mIoU 21.5 above 13.8"),
        ("both", "retrieval"): ("PQ 16.1 above 15.8", "mIoU 22.2 above 21.5"),
        ("both", "CLIP"): ("PQ 16.1 above 10.9", "mIoU 22.2 above 13.8"),
    }
    orderings = [
        Ordering(
            key=f"retclip_{better}_{worse}_{metric}{'_truth' if end else ''}".lower(),
            better=f"{better}{end}",
            worse=f"{worse}{end}",
            metric=metric,
            paper=f"{text} (ADE20k, CLIP ViT-L)",
        )
        for end in ("", _with("truth"))
        for (better, worse), texts in paper.items()
        for metric, text in zip(("pq", "miou"), texts, strict=True)
    ]
    return table(
        "retclip_parts",
        "RetCLIP, training-free: CLIP, retrieval, and both",
        "RetCLIP, table 2, with GroundingDINO + SAM as there, and with true masks. `both` has "
        f"gamma = {gamma}, chosen on validation scenes.",
        bench.evaluated(rows),
        PANOPTIC,
        orderings,
    )


def retclip_proposals(bench: TableBench) -> dict[str, Any]:
    """RetCLIP, table 3."""
    names = {"truth": "true masks", "sam_grid": "grid", "grounded_sam": "GroundingDINO + SAM"}
    rows = {names[proposals]: bench.retclip(proposals) for proposals in names}
    paper = {
        ("true masks", "GroundingDINO + SAM"): "PQ 28.4 above 16.1",
        ("GroundingDINO + SAM", "grid"): "PQ 16.1 above 7.8",
    }
    return table(
        "retclip_proposals",
        "RetCLIP, training-free: quality of the proposals",
        "RetCLIP, table 3.",
        bench.evaluated(rows),
        PANOPTIC,
        [
            Ordering(
                key=f"proposals_{'truth' if better == 'true masks' else 'detector'}",
                better=better,
                worse=worse,
                metric="pq",
                paper=f"{text} (ADE20k, CLIP ViT-L)",
            )
            for (better, worse), text in paper.items()
        ],
    )


RETCLIP_WEIGHTS = (
    (1.0, 1.0, 0.3), (0.5, 0.7, 0.3), (0.4, 0.9, 0.3), (0.4, 0.8, 0.3), (0.4, 0.7, 1.0),
    (0.4, 0.7, 0.7), (0.4, 0.7, 0.6), (0.4, 0.7, 0.5), (0.4, 0.7, 0.4), (0.4, 0.7, 0.3),
    (0.4, 0.7, 0.2), (0.4, 0.7, 0.1), (0.4, 0.7, 0.0), (0.3, 0.7, 0.3),
)  # fmt: skip
"""Alpha, beta and gamma of RetCLIP's table 4."""


def retclip_weights(bench: TableBench) -> dict[str, Any]:
    """RetCLIP, table 4."""

    def name(weights: Sequence[float]) -> str:
        return "{}, {}, {}".format(*weights)

    rows = {
        name(weights): bench.retclip(
            "trained", **dict(zip(("alpha", "beta", "gamma"), weights, strict=True))
        )
        for weights in RETCLIP_WEIGHTS
    }
    best = (0.4, 0.7, 0.3)
    paper = {
        (1.0, 1.0, 0.3): ("trained", "PQ 30.9 above 24.8: the trained classifier helps"),
        (0.4, 0.7, 0.0): ("retrieval", "PQ 30.9 above 26.4: retrieval helps (FC-CLIP has none)"),
        (0.4, 0.7, 1.0): ("clip", "PQ 30.9 above 25.4: CLIP's text helps"),
    }
    return table(
        "retclip_weights",
        "RetCLIP with a trained proposer: alpha, beta, gamma",
        "RetCLIP, table 4, with MaskFormer as the proposer and the in-vocabulary classifier; it "
        "never saw the unseen classes.",
        bench.evaluated(rows),
        ("pq", "miou", "seen", "unseen", "hiou"),
        [
            Ordering(
                key=f"retclip_weights_{key}",
                better=name(best),
                worse=name(weights),
                metric="pq",
                paper=f"{text} (ADE20k)",
            )
            for weights, (key, text) in paper.items()
        ],
    )


WITH_TRAINED_CLASSES = ("VOCSeg", "RetCLIP, trained proposer")
"""Rows with a part that was trained on masks of some of the classes."""


def side_by_side(bench: TableBench) -> dict[str, Any]:
    """Every segmenter, with its own proposals and with true masks."""
    return table(
        "segmenters",
        "All segmenters",
        "Each with the proposals of its paper, then with true masks, which leave classification "
        "alone. A segmenter without instances of its own has the connected parts of its label map. "
        "hIoU is of those with a part that was trained on some of the classes.",
        {
            name: evaluation if name in WITH_TRAINED_CLASSES else _without_split(evaluation)
            for name, evaluation in bench.evaluated(all_segmenters(bench)).items()
        },
        ("miou", "pixel_accuracy", "pq", "sq", "rq", "ap", "hiou"),
        [
            Ordering(
                key="fossil_text",
                better="FOSSIL",
                worse="text only",
                metric="miou",
                paper="18.8 above MaskCLIP's 9.8 (ADE), 24.8 above 16.4 (COCO-Stuff); table 1",
            ),
        ],
    )


def all_segmenters(bench: TableBench) -> dict[str, list[Prediction]]:
    """Predictions of every segmenter by name."""
    parts, data, chosen = bench.parts, bench.data, bench.chosen
    truth = _with("truth")
    return {
        "text only": parts.text_only(data, "none"),
        "FreeDA": parts.freeda(data, chosen.freeda),
        "FOSSIL": parts.fossil(data, chosen.fossil, "opencut"),
        "FOSSIL without proposals": parts.fossil(data, chosen.fossil, "none"),
        "CorrCLIPv2": parts.corrclip(data, chosen.corrclip, "sam_grid"),
        WITH_TRAINED_CLASSES[0]: bench.vocseg(),
        "RetCLIP, training-free": bench.retclip(),
        WITH_TRAINED_CLASSES[1]: bench.retclip("trained"),
        f"text only{truth}": parts.text_only(data, "truth"),
        f"FOSSIL{truth}": parts.fossil(data, chosen.fossil, "truth"),
        f"CorrCLIPv2{truth}": parts.corrclip(data, chosen.corrclip, "truth"),
        f"VOCSeg{truth}": bench.vocseg("truth"),
        f"RetCLIP{truth}": bench.retclip("truth"),
    }


def unseen_classes(bench: TableBench) -> dict[str, Any]:
    """What the trained proposer's classes do to those that it never saw."""
    rows = {
        "VOCSeg, MaskFormer's masks alone": bench.vocseg(beta=1.0),
        "VOCSeg": bench.vocseg(),
        "RetCLIP, MaskFormer's masks alone": bench.retclip("trained", alpha=1.0, beta=1.0),
        "RetCLIP": bench.retclip("trained"),
        "RetCLIP without retrieval (FC-CLIP)": bench.retclip("trained", gamma=0.0),
    }
    split = zip(bench.data.classes, bench.data.seen or (), strict=True)
    names = [name for name, seen in split if not seen]
    return table(
        "unseen",
        "Seen and unseen classes",
        f"MaskFormer was trained without {', '.join(names)}, neither labelled nor shown. hIoU is "
        "the harmonic mean of the two mIoU.",
        bench.evaluated(rows),
        ("seen", "unseen", "hiou", "miou", "pq"),
    )


TABLES: dict[str, Measure] = {
    "segmenters": side_by_side,
    "vocseg_masking": vocseg_masking,
    "vocseg_ensemble": vocseg_ensemble,
    "vocseg_alpha": vocseg_alpha,
    "vocseg_k": vocseg_k,
    "retclip_parts": retclip_parts,
    "retclip_proposals": retclip_proposals,
    "retclip_weights": retclip_weights,
    "unseen": unseen_classes,
}
"""All tables, in the order of the document."""


def _without_split(evaluation: Evaluation) -> Evaluation:
    kept = {n: v for n, v in evaluation.metrics.items() if n not in ("seen", "unseen", "hiou")}
    return replace(evaluation, metrics=kept)


def _with(proposals: str) -> str:
    """End of a row's name; nothing for the proposals of the paper."""
    return f", {PROPOSALS[proposals]}" if proposals == "truth" else ""
