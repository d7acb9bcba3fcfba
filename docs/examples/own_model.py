"""Prototypes as a head of your own torch model: python own_model.py COLLECTION

Features come from any network in the space of the collection; the head compares them with the
prototypes of your classes and lets gradients through.
"""

import sys

import torch

import ovref_inference
from ovref_inference import PrototypeHead, SegmenterModule


class Model(torch.nn.Module):
    """An adapter that is trained, before prototypes that are not."""

    def __init__(self, prototypes, width: int) -> None:
        super().__init__()
        self.adapter = torch.nn.Conv2d(width, width, 1)
        self.head = PrototypeHead(prototypes)

    def forward(self, features_bdhw: torch.Tensor) -> torch.Tensor:
        return self.head(features_bdhw + self.adapter(features_bdhw))


def main(collection: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of training, and the frozen segmenter as a module; returns both outputs."""
    opened = ovref_inference.open(collection)
    classes = opened.nouns[:3]
    width = opened.manifest.visual.dim
    prototypes = opened.prototypes(classes)
    model = Model(prototypes, width)
    optimiser = torch.optim.AdamW(model.adapter.parameters(), lr=1e-3)
    features_bdhw = torch.randn(2, width, 8, 8)
    scores_bchw = model(features_bdhw)
    labels_bhw = torch.randint(0, len(classes), (2, 8, 8))
    torch.nn.functional.nll_loss(scores_bchw.log(), labels_bhw).backward()
    optimiser.step()
    frozen = SegmenterModule(opened.segmenter("fossil"), classes)
    return scores_bchw, frozen(torch.rand(1, 3, 64, 64))


if __name__ == "__main__":
    main(sys.argv[1])
