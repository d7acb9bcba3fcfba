"""How noise becomes an image, step by step: diffusers' schedulers by the names of the settings."""

from typing import Any

import diffusers
import torch


class HostDDIM(diffusers.DDIMScheduler):
    """DDIM that knows which timestep comes.

    diffusers' own reads it back from the device at each step, so the device stands still until the
    next call of the UNet is on its way. The others count their steps.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device="cpu")
        self._to_come = self.timesteps.tolist()
        self.timesteps = self.timesteps.to(device)

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any
    ) -> Any:
        """One step, in the order of `timesteps`; `timestep` is not read."""
        return super().step(model_output, self._to_come.pop(0), sample, **options)


SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (HostDDIM, {}),
    "dpm_solver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "sde_dpm_solver++": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}
"""Name in the configuration -> class and what is set beside the model's own config."""


def make_scheduler(name: str, config: Any) -> Any:
    """The scheduler of this name with a model's own signal table.

    Args:
        name: a key of `SCHEDULERS`.
        config: of the model's scheduler, of whatever class.
    """
    kind, options = SCHEDULERS[name]
    return kind.from_config(config, **options)
