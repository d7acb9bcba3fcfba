"""One recorder for each family of generators; a new family is a new file and an entry here."""

from typing import Any

from ovref.errors import ModelError
from ovref.models.recorders.flux import Flux2Recorder, FluxRecorder
from ovref.models.recorders.pixart_sana import PixArtRecorder, SanaRecorder
from ovref.models.recorders.qwen_image import QwenImageRecorder
from ovref.models.recorders.recorder import Heatmaps, Recorder, TransformerRecorder, guided_steps
from ovref.models.recorders.sd3 import SD3Recorder
from ovref.models.recorders.unet import UNetRecorder
from ovref.models.recorders.z_image import ZImageRecorder

__all__ = ["Heatmaps", "Recorder", "TransformerRecorder", "guided_steps", "recorder_of"]

RECORDERS: dict[str, type[Any]] = {
    kind.network_name: kind
    for kind in (
        UNetRecorder,
        SD3Recorder,
        PixArtRecorder,
        SanaRecorder,
        FluxRecorder,
        Flux2Recorder,
        QwenImageRecorder,
        ZImageRecorder,
    )
}
"""Class of the denoising network -> recorder."""


def network_of(pipeline: Any) -> Any:
    """The denoising network of a pipeline."""
    return getattr(pipeline, "transformer", None) or pipeline.unet


def recorder_class(pipeline: Any) -> type[Recorder]:
    """The class of recorders for the network of a pipeline; raises ModelError without one."""
    name = type(network_of(pipeline)).__name__
    if name not in RECORDERS:
        raise ModelError(f"attribution cannot read a {name}; it reads {', '.join(RECORDERS)}")
    return RECORDERS[name]


def recorder_of(pipeline: Any) -> Recorder:
    """The recorder of a pipeline of `loading.load_pipeline`. Raises as `recorder_class`."""
    return recorder_class(pipeline)(pipeline)
