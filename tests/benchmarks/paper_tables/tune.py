"""Chooses OpenCut's and FOSSIL's parameters on validation scenes, one at a time.

    cd tests/benchmarks && python -m paper_tables.tune COLLECTION [SCENES]

Test scenes are never looked at. What is found goes into the configuration of an evaluation by hand.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from ovref.config import dump
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.evaluate import EvaluateSpec
from ovref.evaluation.methods import Methods
from ovref.evaluation.metrics_semantic import confusion, scores_of_counts
from ovref.evaluation.named_sets.opening import Example
from ovref.evaluation.oracle import oracle_proposer
from ovref_inference.proposers.config import CrfConfig, OpenCutConfig
from ovref_inference.proposers.load import Proposer, opencut_proposer
from ovref_inference.segmenters.fossil import FossilConfig

OPENCUT_OPTIONS: dict[str, Sequence[Any]] = {
    "taus": (
        (0.2,),
        (0.4,),
        (0.6,),
        (0.15, 0.2, 0.3, 0.0, -0.1, 0.8),
        (0.3, 0.4, 0.5),
        (0.4, 0.5, 0.6, 0.7),
        (0.5, 0.6, 0.7, 0.8),
        (0.6, 0.4, 0.2),
        (0.93,),
        (0.97, 0.93),
        (0.98, 0.96, 0.93),
    ),
    "stages": (1, 2, 3, 4),
    "eta": (8.0, 16.0, 32.0, 64.0),
    "mu": (0.5, 0.65, 0.8),
    "rho": (0.3, 0.5, 0.7, 0.85),
}
"""Values tried for each field of OpenCutConfig."""

CRF_OPTIONS: dict[str, Sequence[Any]] = {
    "appearance_weight": (5.0, 10.0, 20.0),
    "appearance_distance": (50.0, 150.0, 300.0),
    "appearance_colour": (5.0, 8.0, 13.0),
    "smoothness_weight": (0.0, 3.0, 7.0),
}
"""Values tried for each field of CrfConfig."""

FOSSIL_OPTIONS: dict[str, Sequence[Any]] = {
    "n": (5, 10, 20, 40, 80, 150),
    "k": (1, 3, 5, 10, 20),
    "gamma": (0.0, 0.25, 0.5, 0.75, 1.0),
}
"""Values tried for each field of FossilConfig."""


def tune(
    spec: EvaluateSpec,
    opencut_options: Mapping[str, Sequence[Any]] = OPENCUT_OPTIONS,
    crf_options: Mapping[str, Sequence[Any]] = CRF_OPTIONS,
    fossil_options: Mapping[str, Sequence[Any]] = FOSSIL_OPTIONS,
    rounds: int = 2,
    progress: Callable[[str], None] = print,
    device: str | None = None,
) -> EvaluateSpec:
    """`spec` with the parameters of OpenCut, its CRF and FOSSIL that give the best mIoU found.

    Fields are tried one after the other, the others as they stand: first FOSSIL's, then OpenCut's,
    then the CRF's, `rounds` times.

    Raises:
        ValueError: `spec` is not on validation scenes, or has no CRF.
    """
    if spec.opencut.crf is None:
        raise ValueError("opencut.crf must be given: its parameters are chosen too")
    if spec.split != "validation":
        raise ValueError(f"parameters are chosen on validation scenes, found split {spec.split!r}")
    with CachedModels(device) as models:
        data = spec.open_data()
        examples = list(data)
        images = [example.image_hwc for example in examples]
        progress(f"encoding {data.name}")
        methods = Methods(spec, data, models)
        methods.encode_batch(examples)
        keys = models.encoder(spec.opencut.keys)
        fossil, cut, crf = spec.fossil, spec.opencut.cut, spec.opencut.crf

        def masked(cut: OpenCutConfig, crf: CrfConfig) -> Proposer:
            found = opencut_proposer(keys, cut, crf=crf, device=device)(images)
            return oracle_proposer(images, found)

        def score(proposer: Proposer, fossil: FossilConfig) -> float:
            segmenter = methods.fossil(fossil, "none")
            segmenter.proposer = proposer
            return miou(segmenter, examples, data.class_names)

        for _ in range(rounds):
            cuts = masked(cut, crf)
            fossil = coordinate_search(
                fossil, fossil_options, lambda f, b=cuts: score(b, f), progress
            )
            cut = coordinate_search(
                cut, opencut_options, lambda c, r=crf, f=fossil: score(masked(c, r), f), progress
            )
            crf = coordinate_search(
                crf, crf_options, lambda r, c=cut, f=fossil: score(masked(c, r), f), progress
            )
    return replace(spec, fossil=fossil, opencut=replace(spec.opencut, cut=cut, crf=crf))


def coordinate_search(
    config: Any,
    options: Mapping[str, Sequence[Any]],
    score: Callable[[Any], float],
    progress: Callable[[str], None],
) -> Any:
    """The frozen dataclass with each field of `options` in turn set to its best-scoring value.

    A value replaces the present one only if it scores strictly better.
    """
    best = score(config)
    for name, values in options.items():
        for value in values:
            if value == getattr(config, name):
                continue
            tried = replace(config, **{name: value})
            found = score(tried)
            progress(f"{name} = {value}: {100 * found:.1f} (best {100 * best:.1f})")
            if found > best:
                config, best = tried, found
    return config


def miou(segmenter: Any, examples: Sequence[Example], class_names: Sequence[str]) -> float:
    """Mean IoU over all images, one image at a time to bound memory."""
    counts = 0
    for one in examples:
        labels_hw = segmenter.segment([one.image_hwc], class_names)[0].labels_hw
        counts = counts + confusion(one.label_hw, labels_hw, len(class_names))
    return scores_of_counts(counts).miou


if __name__ == "__main__":
    scenes = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    best = tune(EvaluateSpec(collection=sys.argv[1], output="", split="validation", scenes=scenes))
    chosen = dump(best)
    print(yaml.safe_dump({name: chosen[name] for name in ("fossil", "opencut")}))
