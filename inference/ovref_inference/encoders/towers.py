"""What the libraries' image towers become: pixels in, one vector for each cell of a grid out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.errors import ModelError
from ovref_inference.pixels import Pixels

Layer = Callable[[torch.Tensor], torch.Tensor]
Pool = Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], torch.Tensor]


@dataclass(kw_only=True, eq=False)
class Tower:
    """An image tower on its device, ready for images of one size."""

    model_class: str = ""
    """Class of the model in its library, for messages."""
    forward: Layer
    """Pixels (n, 3, *size_hw) -> (n, cells, c), cells by rows."""
    head: Layer | None = None
    """(m, c) of what `forward` gives -> (m, dim), after pooling; None where nothing follows."""
    pool: Pool | None = None
    """(cells, c) of an image, (1, cells) covered parts and the grid -> (1, dim), in place of the
    mean and `head`; None where the mean is taken."""
    fit: Callable[[tuple[int, int]], None] | None = None
    """Brings the weights to images of another grid before `forward`; None where `forward` takes
    images of any size. For `aspect="kept"` alone."""
    size_hw: tuple[int, int]
    """Height and width in pixels to which images are resized, multiples of the patch."""
    patch_size: int
    """Pixels per side of a cell."""
    prefix_tokens: int = 0
    """Class and register tokens before those of the patches, which `forward` leaves out."""
    images: Pixels
    """Preprocessing."""
    parameters: int = 0
    """How many numbers its weights are; 0 if unknown."""

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self.size_hw[0] // self.patch_size, self.size_hw[1] // self.patch_size


class Alone(torch.nn.Module):
    """A transformer's layer in which each token attends to itself alone (MaskCLIP, Zhou et al.,
    ECCV 2022): it runs on sequences of one token, where attention is the identity on values."""

    def __init__(self, layer: torch.nn.Module, **options: Any) -> None:
        """`options` take the place of whatever the model gives its layers beside the tokens."""
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, tokens_nld: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        found = self.layer(tokens_nld.flatten(0, 1)[:, None], **self.options)
        return found.view_as(tokens_nld)


def parameters_of(model: torch.nn.Module) -> int:
    """How many numbers the weights of a model are."""
    return sum(weight.numel() for weight in model.parameters())


def unusable(model_id: str, model_class: str, missing: str, works: str) -> ModelError:
    """The error of a model that loads but cannot be used as it is asked for."""
    return ModelError(f"{model_id} ({model_class}) cannot be used: {missing}; {works}")


def check_precision(config: VisualEncoderConfig, architecture: str) -> None:
    """Raises ModelError for an architecture that overflows in the configured precision."""
    if config.precision == "float16" and "dinov3" in architecture:
        raise unusable(config.model, architecture, "DINOv3 overflows in float16",
                       "precision bfloat16 or float32 works")  # fmt: skip


def keep_until(layers: Any, config: VisualEncoderConfig, model_class: str) -> None:
    """Takes away the layers after the configured one, which then is the last.

    Args:
        layers: ModuleList or Sequential; None for a model that has no single list of them.

    Raises:
        ModelError: there is no such layer.
    """
    if config.layer == -1:
        return
    if layers is None:
        raise unusable(
            config.model, model_class, "it has no list of equal layers", "layer -1 works"
        )
    count = len(layers)
    if not -count <= config.layer < count:
        raise ModelError(f"{config.model} has {count} layers: layer must be -{count} to "
                         f"{count - 1}, found {config.layer}")  # fmt: skip
    del layers[config.layer % count + 1 :]


def pair(size: Any) -> tuple[int, int]:
    """Height and width, of which libraries give one number where they are equal."""
    return tuple(size) if isinstance(size, tuple | list) else (size, size)
