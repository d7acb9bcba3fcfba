"""The shipped SAM, GroundingDINO and MaskFormers load as the real ones do and segment test scenes.

Floors are well below what was measured (tests/benchmarks/results/miniature_grounding.md).
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from ovref.miniature.scenes import render  # noqa: E402
from ovref.miniature.shapes import CLASSES, UNSEEN  # noqa: E402
from ovref_inference.collection.retrieve import class_embeddings  # noqa: E402
from ovref_inference.encoders.config import TextEncoderConfig  # noqa: E402
from ovref_inference.encoders.load import load_text_encoder  # noqa: E402
from ovref_inference.proposers.config import (  # noqa: E402
    FcClipConfig,
    GroundingDinoConfig,
    MaskFormerConfig,
)
from ovref_inference.proposers.detectors import load_detector  # noqa: E402
from ovref_inference.proposers.fcclip import load_fcclip  # noqa: E402
from ovref_inference.proposers.mask_former import load_mask_former  # noqa: E402
from ovref_inference.proposers.sam import SamMasks  # noqa: E402
from ovref_inference.proposers.sam_model import load_sam  # noqa: E402
from ovref_miniature import weights_path  # noqa: E402
from recipes.miniature.masks_data import boxes_of, regions  # noqa: E402
from recipes.miniature.measure_grounding import maskformer_answers, pairwise_iou  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def scenes():
    return [render(i, "test") for i in range(24)]


@pytest.fixture(scope="module")
def truth(scenes):
    return [regions(scene.label_hw, scene.instance_hw) for scene in scenes]


@pytest.fixture(scope="module")
def masker():
    return SamMasks(load_sam("miniature:sam"))


@pytest.mark.parametrize("name", ["sam", "grounding_dino", "maskformer"])
def test_weights_are_half_precision(name):
    state = load_file(weights_path(name) / "model.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize("name", ["fcclip", "open_mask_former"])
def test_trained_proposers_find_and_name_regions_of_seen_classes(name, scenes, truth):
    """tests/benchmarks/results/trained_proposers.md says how well."""
    (path,) = weights_path(name).glob("*.safetensors")
    assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}
    if name == "fcclip":
        config = FcClipConfig(model="miniature:fcclip", short_side=192, long_side=192)
        proposer = load_fcclip(config, device="cpu")
    else:
        config = MaskFormerConfig(model="miniature:open_mask_former", min_score=0.0)
        proposer = load_mask_former(config, device="cpu")
    text = load_text_encoder(TextEncoderConfig(model="miniature:clip"), device="cpu")
    overlaps, right = [], []
    found = list(proposer.propose([s.image_hwc for s in scenes]))
    texts_cd = class_embeddings(text, CLASSES, found[0].open_classes.templates)
    for one, (masks, classes, _) in zip(found, truth, strict=True):
        assert one.trained_names and not set(one.trained_names) - set(CLASSES)
        guessed_n = one.open_classes.probabilities(texts_cd)[:, :-1].argmax(1)
        every = pairwise_iou(masks, one.masks(0.5))
        for region, label in enumerate(classes):
            if CLASSES[label] in one.trained_names:
                overlaps.append(every[region].max())
                right.append(guessed_n[every[region].argmax()] == label)
    assert np.mean(overlaps) > 0.5
    assert np.mean(right) > {"fcclip": 0.7, "open_mask_former": 0.35}[name]


def test_overlap_of_masks():
    one = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]], bool)
    other = np.array([[[1, 0], [1, 0]]], bool)
    assert pairwise_iou(one, other).tolist() == [[pytest.approx(1 / 3)], [0]]


def test_sam_segments_what_a_box_holds(masker, scenes, truth):
    images, boxes = [s.image_hwc for s in scenes], [boxes_of(masks) for masks, _, _ in truth]
    answers = list(masker.of_boxes(images, boxes))
    overlaps = np.concatenate([
        np.diag(pairwise_iou(found, masks))
        for (found, _), (masks, _, _) in zip(answers, truth, strict=True)
    ])  # fmt: skip
    assert overlaps.mean() > 0.8
    guessed = np.concatenate([ious for _, ious in answers])
    assert np.abs(guessed - overlaps).mean() < 0.15


def test_grounding_dino_and_sam_find_the_nouns_of_a_caption(masker, scenes, truth):
    config = GroundingDinoConfig(
        model="miniature:grounding_dino", box_threshold=0.2, text_threshold=0.2
    )
    detector = load_detector(config, device="cpu")
    images = [s.image_hwc for s in scenes]
    nouns = [list(dict.fromkeys(noun.lemma for noun in s.nouns)) for s in scenes]
    found = detector.detect(images, nouns)
    masks = masker.of_boxes(images, [d.boxes_xyxy for d in found])
    best = []
    for names, answer, (guess, _), (true, classes, _) in zip(
        nouns, found, masks, truth, strict=True
    ):
        for number, name in enumerate(names):
            overlaps = pairwise_iou(true[classes == CLASSES.index(name)],
                                    guess[answer.nouns == number])  # fmt: skip
            best += overlaps.max(1, initial=0).tolist()
    assert np.mean(np.array(best) >= 0.6) > 0.7


def test_grounding_dino_as_transformers_runs_it(scenes):
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    folder = weights_path("grounding_dino")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    scene = scenes[0]
    names = [noun.lemma for noun in scene.nouns]
    inputs = processor(images=scene.image_hwc, text=[names], return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 64, 64)
    with torch.no_grad():
        outputs = model(**inputs)
    (result,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.2, text_threshold=0.2, target_sizes=[(64, 64)]
    )
    assert len(result["boxes"]) and set(result["text_labels"]) & set(names)


def test_maskformer_proposes_regions_of_seen_classes(scenes, truth):
    from transformers import AutoConfig

    labels = AutoConfig.from_pretrained(weights_path("maskformer")).id2label
    assert set(labels.values()) == set(CLASSES) - set(UNSEEN)
    best = []
    for (masks, classes, _), (guess, chances) in zip(
        truth, maskformer_answers([s.image_hwc for s in scenes]), strict=True
    ):
        assert chances.shape == (len(guess), len(labels) + 1)
        seen = np.isin(classes, [CLASSES.index(name) for name in labels.values()])
        best += pairwise_iou(masks[seen], guess).max(1).tolist()
    assert np.mean(best) > 0.6
