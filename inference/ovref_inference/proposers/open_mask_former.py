"""MaskFormer with open classes (VOCSeg section 3.2, after Xu et al.: zsseg, Liang et al.: OVSeg).

Every query gives an embedding in CLIP's space in place of scores of the trained classes. It is
compared with the texts of any classes and with a learnt embedding of no object. A model is a folder
of transformers' layout, whose config.json has `open_classes` besides:

    widths          of the layers that make an embedding of a query, the first and the last included
    scale           factor of cosines
    templates       those that it was trained with
    texts           how many texts of trained classes are stored; 0 where they are unknown
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import MaskFormerForInstanceSegmentation


class OpenMaskFormer(MaskFormerForInstanceSegmentation):
    """transformers' MaskFormer, whose `class_queries_logits` are embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.open_classes
        widths = settings["widths"]
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            steps += [nn.Linear(before, after), nn.ReLU()]
        self.class_predictor = nn.Sequential(*steps[:-1])  # type: ignore[assignment]
        self.void = nn.Parameter(torch.randn(1, widths[-1]) * widths[-1] ** -0.5)
        self.trained_texts: torch.Tensor
        self.register_buffer("trained_texts", torch.zeros(settings["texts"], widths[-1]))

    @property
    def scale(self) -> float:
        """The factor of cosines."""
        return self.config.open_classes["scale"]

    @property
    def templates(self) -> tuple[str, ...]:
        """Those that it was trained with."""
        return tuple(self.config.open_classes["templates"])
