"""Schedulers: diffusers' classes by setting name, with the noise schedule of a model."""

import inspect
from typing import Any

import diffusers
import torch

from ovref.errors import ModelError

_DDIM: Any = diffusers.DDIMScheduler  # its decorators hide its methods from type checkers


class HostDDIM(_DDIM):
    """DDIM without a synchronisation at each step.

    diffusers' DDIM reads the timestep back from the device, which then idles until the next UNet
    call is launched. The other schedulers count their steps.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device="cpu")
        timesteps: torch.Tensor = self.timesteps
        self._remaining = timesteps.tolist()
        self.timesteps: torch.Tensor = timesteps.to(device)

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any
    ) -> Any:
        """One step, in the order of `timesteps`; `timestep` is not read."""
        return super().step(model_output, self._remaining.pop(0), sample, **options)


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
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
    "flow_euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "scm": (diffusers.SCMScheduler, {}),
}
"""Setting -> class, and what is set in addition to the model's own config."""


TRAINED = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
"""Fields that describe the noise that the model was trained with. Defaults differ between classes,
so these are carried over even if the model's file leaves them to its own class."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""Supported predictions of a model of betas; `flow_prediction` belongs to flow matching."""
BETAS, FLOW, TRIGFLOW = "betas", "flow matching", "TrigFlow (Sana-Sprint)"
OTHER = "another family (EDM, ...)"
STEPS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "flow_shift": 1.0,
    "snr_shift_scale": 1.0,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "sigma_min": None,
    "sigma_max": None,
}
"""Fields that change the noise levels of the steps -> the neutral value. A scheduler without such a
field is refused unless the field has that value; all have `timestep_spacing` and `steps_offset`."""


def make_scheduler(name: str, config: Any) -> Any:
    """The scheduler of this name with the noise schedule of a model.

    Fields in the model's file are kept. Other fields have the chosen class's defaults, as in
    diffusers, except those in `TRAINED`.

    Args:
        name: a key of `SCHEDULERS`.
        config: configuration of the model's scheduler object (not of its file), of any class.

    Models of flow matching take `flow_euler`. Those whose own scheduler is a class of betas that is
    set to flow matching (Sana) take any class with these settings. Sana-Sprint takes `scm`.

    Raises:
        ModelError: the model's scheduler belongs to another family than the chosen one, or has a
            setting that changes the noise schedule and is missing from the chosen scheduler.
    """
    kind, options = SCHEDULERS[name]
    own = _family(config)
    if own != _family(kind().config):
        takes = [other for other in SCHEDULERS if _family(SCHEDULERS[other][0]().config) == own]
        raise ModelError(
            f"the model's own scheduler is one of {own}, so {name!r} would generate with a noise "
            "schedule that the model was not trained on: "
            + (f"choose one of {', '.join(takes)}" if takes else "use another model")
        )
    if own == FLOW and config.get("stochastic_sampling"):
        raise ModelError(
            "the model's scheduler has stochastic_sampling, whose noise the pipeline does not take "
            "from the images' seeds: set it to false in the model's scheduler_config.json"
        )
    if own in (FLOW, TRIGFLOW):
        return kind.from_config(config, **options)
    trained = {field: config[field] for field in TRAINED if field in config}
    flow = trained.get("prediction_type") == "flow_prediction"
    if flow != bool(config.get("use_flow_sigmas")):
        raise ModelError(
            f"the model's scheduler has prediction_type {config['prediction_type']!r} and "
            f"use_flow_sigmas {config.get('use_flow_sigmas')!r}: expected flow_prediction with "
            "use_flow_sigmas, or neither"
        )
    if not flow and trained.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise ModelError(
            f"the model's scheduler has prediction_type {config['prediction_type']!r}, expected "
            f"one of {', '.join(PREDICTIONS)}"
        )
    unknown = {
        field: config[field]
        for field, neutral in STEPS.items()
        if field in config and field not in _fields(name) and config[field] not in (neutral, None)
    }
    if unknown:
        stated = ", ".join(f"{field}={value!r}" for field, value in unknown.items())
        able = [other for other in SCHEDULERS if unknown.keys() <= _fields(other)]
        advice = f"choose one of {', '.join(able)}" if able else "change the model's file"
        raise ModelError(
            f"the model's scheduler has {stated}, which scheduler {name!r} does not have: {advice}"
        )
    try:
        return kind.from_config(config, **(trained | options))
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"scheduler {name!r} cannot take over the model's noise schedule: {error}"
        ) from error


def _fields(name: str) -> set[str]:
    return set(inspect.signature(SCHEDULERS[name][0]).parameters)


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Sets the steps of a scheduler as a pipeline would, to find out whether it can make them.

    Raises:
        ValueError: as the scheduler does.
    """
    options: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = 1.0  # pipelines compute it from the size of the image
    if isinstance(scheduler, diffusers.SCMScheduler) and steps != 2:
        options["intermediate_timesteps"] = None
    scheduler.set_timesteps(steps, **options)


def _family(config: Any) -> str:
    """The family of noise schedules that a scheduler's configuration belongs to."""
    if "beta_schedule" in config or config.get("trained_betas") is not None:
        return BETAS
    if config.get("prediction_type") == "trigflow":
        return TRIGFLOW
    return FLOW if "shift" in config and "use_dynamic_shifting" in config else OTHER
