"""GroundingDINO: which noun a box belongs to, batches, and transformers' own post-processing."""

import numpy as np
import pytest
import torch
from detector_fakes import (
    ScriptedDetector,
    image_processor,
    tiny_grounding_dino,
    tokenizer,
)
from torchvision.ops import clip_boxes_to_image
from transformers import GroundingDinoProcessor

from ovref_inference import ModelError
from ovref_inference.proposers.config import GroundingDinoConfig
from ovref_inference.proposers.detectors import load_detector
from ovref_inference.proposers.grounding import GroundingDino

IMAGE = np.zeros((50, 100, 3), np.uint8)
LEFT, RIGHT, MIDDLE = [0.25, 0.5, 0.2, 0.4], [0.75, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.4]


def config(**changes):
    return GroundingDinoConfig(**{"model": "unused", **changes})


def scripted(script, longest=256, batch_size=8, **changes):
    model = ScriptedDetector(script, longest)
    detector = GroundingDino(
        model, tokenizer(), image_processor(), config(**changes), batch_size=batch_size
    )
    return model, detector


def found(detector, *nouns):
    """[(noun, score to two places)] of one image, and the boxes."""
    answer = detector.detect([IMAGE], [nouns])[0]
    named = [
        (nouns[number], round(float(score), 2))
        for number, score in zip(answer.nouns, answer.scores, strict=True)
    ]
    return named, answer.boxes_xyxy


def test_the_prompt_is_nouns_with_stops_and_ids_are_those_of_the_whole_text():
    model, detector = scripted([(LEFT, {})])
    detector.detect([IMAGE], [["cat", "red panda", "traffic light"]])
    expected = ["[CLS]", "cat", ".", "red", "pa", "##nda", ".", "traffic", "light", ".", "[SEP]"]
    assert model.prompts == [expected]
    text = "cat. red panda. traffic light."
    assert tokenizer().convert_ids_to_tokens(tokenizer()(text).input_ids) == expected


def test_a_box_belongs_to_the_noun_whose_tokens_are_most_probable_together():
    _, detector = scripted(
        [(LEFT, {1: 0.6, "traffic": 0.9, 4: 0.8}), (RIGHT, {1: 0.7, "traffic": 0.1, 4: 0.7})]
    )
    named, boxes = found(detector, "light", "traffic light")
    assert named == [("traffic light", 0.85), ("light", 0.7)]
    np.testing.assert_allclose(boxes, [[15, 15, 35, 35], [65, 15, 85, 35]], atol=1e-4)


def test_one_token_of_a_noun_is_not_the_noun():
    _, detector = scripted([(LEFT, {"traffic": 0.45})])
    assert found(detector, "traffic light")[0] == []
    _, detector = scripted([(LEFT, {"traffic": 0.45})], text_threshold=0.2)
    assert found(detector, "traffic light")[0] == [("traffic light", 0.23)]


def test_both_thresholds_must_be_exceeded():
    script = [(LEFT, {"cat": 0.35001}), (RIGHT, {"cat": 0.34999})]
    assert found(scripted(script)[1], "cat")[0] == [("cat", 0.35)]
    assert found(scripted(script, text_threshold=0.36)[1], "cat")[0] == []
    assert len(found(scripted(script, box_threshold=0.3)[1], "cat")[0]) == 2


def test_a_noun_given_twice_is_asked_for_once_and_found_under_its_first_number():
    model, detector = scripted([(LEFT, {"dog": 0.9})])
    answer = detector.detect([IMAGE], [["cat", "dog", "dog", "cat"]])[0]
    assert model.prompts[0].count("dog") == model.prompts[0].count("cat") == 1
    assert answer.nouns.tolist() == [1]


def test_stops_within_a_noun_do_not_cut_it():
    model, detector = scripted([(LEFT, {"st": 0.9, "bernard": 0.9})])
    assert found(detector, "st. bernard", "cat")[0] == [("st. bernard", 0.9)]
    assert model.prompts[0][:5] == ["[CLS]", "st", "bernard", ".", "cat"]


@pytest.mark.parametrize("noun", ["", ".", "日本", "\u200b", "zzz"])
def test_a_noun_that_the_tokenizer_does_not_know_is_never_found(noun):
    model, detector = scripted([(LEFT, {"cat": 0.9, "[UNK]": 0.9, ".": 0.0})])
    assert found(detector, noun)[0] == [] and model.batches == []
    assert found(detector, noun, "cat")[0] == [("cat", 0.9)]


def test_nouns_that_do_not_fit_into_one_prompt_go_into_several():
    letters = list("abcdefghijklmn")
    model, detector = scripted([(LEFT, {"n": 0.9}), (RIGHT, {"a": 0.8})], longest=8)
    named, _ = found(detector, *letters)
    assert named == [("n", 0.9), ("a", 0.8)]
    assert max(map(len, model.prompts)) == 8 and len(model.prompts) == 5
    asked = [token for prompt in model.prompts for token in prompt]
    assert [token for token in asked if token in letters] == letters
    too_long = "red " * 6
    assert found(detector, too_long.strip(), "n")[0] == [("n", 0.9)]


def test_duplicates_are_suppressed_for_each_noun_alone():
    near = [0.25, 0.5, 0.2, 0.38]
    script = [(LEFT, {"cat": 0.6}), (near, {"cat": 0.7}), (near, {"dog": 0.5})]
    assert found(scripted(script)[1], "cat", "dog")[0] == [("cat", 0.7), ("dog", 0.5)]
    named = found(scripted(script, nms_iou=0.99)[1], "cat", "dog")[0]
    assert named == [("cat", 0.7), ("cat", 0.6), ("dog", 0.5)]


def test_boxes_are_clipped_and_those_outside_left_out():
    script = [([0.0, 0.0, 0.5, 2.0], {"cat": 0.9}), ([1.5, 0.5, 0.2, 0.2], {"cat": 0.8}),
              ([0.5, 0.5, 0.0, 0.2], {"cat": 0.7})]  # fmt: skip
    named, boxes = found(scripted(script)[1], "cat")
    assert named == [("cat", 0.9)]
    np.testing.assert_allclose(boxes, [[0, 0, 25, 50]])


def test_images_without_nouns_and_no_images():
    model, detector = scripted([(LEFT, {"cat": 0.9})])
    assert detector.detect([], []) == []
    answers = detector.detect([IMAGE, IMAGE], [[], ["cat"]])
    assert answers[0].boxes_xyxy.shape == (0, 4) and answers[0].boxes_xyxy.dtype == np.float32
    assert answers[0].nouns.shape == answers[0].scores.shape == (0,)
    assert len(answers[1].scores) == 1 and model.batches == [1]


def test_an_image_of_another_type_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        scripted([])[1].detect([IMAGE / 255], [["cat"]])


@pytest.fixture(scope="module")
def model():
    return tiny_grounding_dino()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (64, 96), (50, 70), (96, 64), (64, 64), (64, 64), (30, 40), (64, 64)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


NOUNS = [["cat"], ["dog", "sky"], ["light", "traffic light"], ["red panda", "cat", "tree"],
         ["lamp"], ["cat", "dog", "a", "b"], ["sky"], ["tree", "light"]]  # fmt: skip


def test_boxes_are_those_of_transformers_own_post_processing(model, images):
    """With one noun of one token, transformers' phrases are the noun or nothing of it."""
    tokens = tokenizer()
    processor = GroundingDinoProcessor(image_processor(), tokens)
    for image_hwc in images[:3]:
        inputs = processor(images=image_hwc, text="cat.", return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        chances = outputs.logits.sigmoid()[0]
        threshold = float(chances.amax(1).median())
        text_threshold = float(chances[:, 1].median())
        theirs = processor.post_process_grounded_object_detection(
            outputs, inputs.input_ids, threshold, text_threshold, [image_hwc.shape[:2]]
        )[0]
        named = ["cat" in label for label in theirs["text_labels"]]  # "cat", "cat.", "", "."
        expected = clip_boxes_to_image(theirs["boxes"][named], image_hwc.shape[:2])
        settings = config(box_threshold=threshold, text_threshold=text_threshold, nms_iou=1.0)
        ours = GroundingDino(model, tokens, image_processor(), settings).detect(
            [image_hwc], [["cat"]]
        )[0]
        assert 0 < len(ours.scores) < 20
        np.testing.assert_allclose(
            sorted(ours.boxes_xyxy.round(2).tolist()), sorted(expected.numpy().round(2).tolist())
        )


def test_eight_images_with_different_nouns_run_as_one_batch(images):
    script = [(LEFT, {word: 0.9}) for word in ("cat", "dog", "light", "lamp", "sky", "tree")]
    model, detector = scripted(script, nms_iou=1.0)
    answers = detector.detect(images, NOUNS)
    assert model.batches == [8]
    for image_hwc, nouns, answer, inside_hw in zip(
        images, NOUNS, answers, model.inside[0], strict=True
    ):
        height, width = image_hwc.shape[:2]
        box = np.array([0.15 * width, 0.3 * height, 0.35 * width, 0.7 * height])
        assert answer.boxes_xyxy == pytest.approx(np.tile(box, (len(answer.nouns), 1)), abs=1e-3)
        expected = {n for n in nouns if n in ("cat", "dog", "light", "lamp", "sky", "tree")}
        assert {nouns[number] for number in answer.nouns} >= expected
        # Resized to 64 pixels on the short side, and distinguished from the padding.
        scale = 64 / min(height, width)
        rows, columns = int(inside_hw.any(1).sum()), int(inside_hw.any(0).sum())
        assert (rows, columns) == pytest.approx((height * scale, width * scale), abs=1)
        assert inside_hw.shape == (96, 96) and inside_hw.sum() == rows * columns


def test_prompts_of_different_lengths_do_not_change_each_other(model, images):
    settings = config(box_threshold=0.0, text_threshold=0.0, nms_iou=1.0)
    detector = GroundingDino(model, tokenizer(), image_processor(), settings)
    same = [images[0], images[4], images[5]]
    together = detector.detect(same, NOUNS[:3])
    for image_hwc, nouns, batched in zip(same, NOUNS, together, strict=False):
        alone = detector.detect([image_hwc], [nouns])[0]
        np.testing.assert_allclose(alone.scores, batched.scores, atol=1e-5)
        np.testing.assert_allclose(alone.boxes_xyxy, batched.boxes_xyxy, atol=1e-3)
        np.testing.assert_array_equal(alone.nouns, batched.nouns)


def test_a_saved_folder_loads(model, images, tmp_path):
    GroundingDinoProcessor(image_processor(), tokenizer()).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    settings = config(model=str(tmp_path), box_threshold=0.0, text_threshold=0.0)
    loaded = load_detector(settings, device="cpu")
    direct = GroundingDino(model, tokenizer(), image_processor(), settings)
    for ours, expected in zip(
        loaded.detect(images[:2], NOUNS[:2]), direct.detect(images[:2], NOUNS[:2]), strict=True
    ):
        np.testing.assert_allclose(ours.boxes_xyxy, expected.boxes_xyxy, atol=1e-4)


def test_what_cannot_be_loaded(model, tmp_path):
    with pytest.raises(ModelError, match="cannot load the detector"):
        load_detector(config(model=str(tmp_path)))
    other = tokenizer()
    other.add_tokens(["[X]"], special_tokens=True)
    other.sep_token = "[X]"
    with pytest.raises(ModelError, match="ends phrases at the ids"):
        GroundingDino(model, other, image_processor(), config())


@pytest.mark.parametrize("name", ["box_threshold", "text_threshold", "nms_iou"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name):
        config(**{name: 1.01})
