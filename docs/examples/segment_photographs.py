"""Segments pictures and hands them on: python segment_photographs.py COLLECTION PICTURE..."""

import sys

import ovref_inference


def main(collection: str, pictures: list[str]) -> list:
    """Prints what is in each picture; returns supervision's detections."""
    classes = ["tree", "grass", "sky", "sun", "house", "brick wall"]
    segmenter = ovref_inference.open(collection).segmenter("fossil")
    images = [ovref_inference.read_image(picture) for picture in pictures]
    found = []
    for picture, segmentation in zip(pictures, segmenter.segment(images, classes), strict=True):
        detections = segmentation.to_supervision(classes)
        print(picture, dict(zip(detections.data["class_name"], detections.area, strict=True)))
        found.append(detections)
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
