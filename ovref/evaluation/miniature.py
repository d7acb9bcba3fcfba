"""Models and parameters for scenes of the miniature, chosen on validation scenes."""

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.proposers.config import CrfConfig, OpenCutConfig, OpenCutProposerConfig
from ovref_inference.segmenters.fossil import FossilConfig

FOSSIL = FossilConfig(n=20, k=10, windows=None)

CLIP = VisualEncoderConfig(
    model="miniature:clip", library="open_clip", features="values", size_hw=(64, 64)
)

OPENCUT = OpenCutProposerConfig(
    # Its tokens gave better cuts than the keys of `miniature:dino`.
    keys=VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64)),
    cut=OpenCutConfig(taus=(0.93,), stages=4, foreground="smaller"),
    # Scenes have 64 pixels a side; MaskCut's smoothness is made for 480.
    crf=CrfConfig(appearance_distance=150.0, appearance_colour=8.0, smoothness_weight=0.0),
)
