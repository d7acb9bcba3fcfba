"""Run: pytest tests/ovref/models/test_schedulers.py"""

import diffusers
import pytest
import torch

from ovref.errors import ModelError
from ovref.models.schedulers import SCHEDULERS, make_scheduler, set_timesteps

OF_BETAS = [name for name in SCHEDULERS if name not in ("flow_euler", "scm")]
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("name", OF_BETAS)
@pytest.mark.parametrize(
    "source",
    [
        diffusers.PNDMScheduler(**STABLE_DIFFUSION, steps_offset=1, skip_prk_steps=True),
        diffusers.DDIMScheduler(),  # all left to the class, whose defaults are not those of LCM
        diffusers.LCMScheduler(),
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(trained_betas=[0.001 * (1 + n) for n in range(100)],
                                num_train_timesteps=100),
        diffusers.DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction",
                                rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading"),
    ],
    ids=["pndm", "defaults", "lcm_defaults", "cosine", "trained_betas", "zero_snr", "euler"],
)  # fmt: skip
def test_the_models_noise_schedule_is_kept(name, source):
    made = make_scheduler(name, source.config)
    if source.config.get("rescale_betas_zero_snr"):  # the last level is 0; some classes move it
        assert made.config.rescale_betas_zero_snr
        torch.testing.assert_close(made.alphas_cumprod[:-1], source.alphas_cumprod[:-1])
    else:
        torch.testing.assert_close(made.alphas_cumprod, source.alphas_cumprod, rtol=0, atol=0)
    assert made.config.prediction_type == source.config.prediction_type
    assert made.config.num_train_timesteps == source.config.num_train_timesteps
    left_to_the_class = source.config.get("_use_default_values", [])
    for field in ("timestep_spacing", "steps_offset"):
        if field in source.config and field not in left_to_the_class:
            assert made.config[field] == source.config[field]


@pytest.mark.parametrize("name", ["dpm_solver++", "unipc", "euler"])
def test_timesteps_are_those_of_diffusers(name):
    """With the settings that the chosen class shares with the model's."""
    options = {**STABLE_DIFFUSION, "use_karras_sigmas": True, "timestep_spacing": "trailing"}
    source = diffusers.EulerDiscreteScheduler(**options)
    kind, own = SCHEDULERS[name]
    made, expected = make_scheduler(name, source.config), kind(**options, **own)
    made.set_timesteps(7)
    expected.set_timesteps(7)
    torch.testing.assert_close(made.timesteps, expected.timesteps, rtol=0, atol=0)
    torch.testing.assert_close(made.sigmas, expected.sigmas, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (diffusers.EDMEulerScheduler, "use another model"),
        (diffusers.EDMDPMSolverMultistepScheduler, "use another model"),
        (diffusers.DDPMWuerstchenScheduler, "use another model"),
        (diffusers.FlowMatchEulerDiscreteScheduler, "choose one of flow_euler"),
        (diffusers.SCMScheduler, "choose one of scm"),
        (diffusers.PNDMScheduler, "choose one of ddim"),
    ],
)
def test_a_model_of_another_family_is_refused(name, source, advice):
    if advice.split()[-1] == name or (name in OF_BETAS and source is diffusers.PNDMScheduler):
        assert make_scheduler(name, source().config)
        return
    with pytest.raises(ModelError, match=f"would generate with a noise schedule .*{advice}"):
        make_scheduler(name, source().config)


def test_the_shift_of_flow_matching_is_kept():
    source = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = make_scheduler("flow_euler", source.config)
    source.set_timesteps(4)
    made.set_timesteps(4)
    torch.testing.assert_close(made.sigmas, source.sigmas, rtol=0, atol=0)


def test_noise_that_is_not_of_the_images_seeds_is_refused():
    config = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config
    with pytest.raises(ModelError, match="set it to false"):
        make_scheduler("flow_euler", config)


@pytest.mark.parametrize("name", OF_BETAS)
def test_flow_matching_in_a_class_of_betas_goes_to_classes_that_know_it(name):
    """As in Sana."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    source = diffusers.DPMSolverMultistepScheduler(**options)
    if name not in ("dpm_solver++", "sde_dpm_solver++", "unipc"):
        with pytest.raises(ModelError, match=r"which scheduler .* does not have: choose one of"):
            make_scheduler(name, source.config)
        return
    made = make_scheduler(name, source.config)
    assert {field: made.config[field] for field in options} == options
    made.set_timesteps(5)
    source.set_timesteps(5)
    torch.testing.assert_close(made.sigmas, source.sigmas, rtol=0.01, atol=0)  # they round apart


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4),
        (diffusers.SCMScheduler(), 2),
        (diffusers.SCMScheduler(), 3),
        (diffusers.DDIMScheduler(), 4),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_steps_are_set_as_a_pipeline_sets_them(scheduler, steps):
    set_timesteps(scheduler, steps)
    assert scheduler.num_inference_steps == steps


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_flow_sigmas": True, "prediction_type": "epsilon"}, "use_flow_sigmas"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    ],
    ids=str,
)
def test_flow_matching_in_a_class_with_betas_is_refused(options, named):
    config = diffusers.UniPCMultistepScheduler(**options).config
    with pytest.raises(ModelError, match=named):
        make_scheduler("unipc", config)


@pytest.mark.parametrize("name", OF_BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"timestep_type": "continuous"},
        {"interpolation_type": "log_linear"},
        {"final_sigmas_type": "sigma_min"},
    ],
    ids=str,
)
def test_what_changes_the_steps_is_carried_over_or_refused(name, options):
    source = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, **options)
    ((field, value),) = options.items()
    try:
        made = make_scheduler(name, source.config)
    except ModelError as error:
        assert f"{field}={value!r}" in str(error)
        assert "choose one of" in str(error) and "euler" in str(error)
        assert field not in SCHEDULERS[name][0]().config
    else:
        assert made.config[field] == value


def test_a_shifted_schedule_is_refused():
    config = diffusers.CogVideoXDDIMScheduler().config
    with pytest.raises(ModelError, match=r"snr_shift_scale=3\.0, which scheduler 'ddim' does not"):
        make_scheduler("ddim", config)


def test_betas_that_a_class_does_not_know_are_refused():
    config = diffusers.DDPMScheduler(beta_schedule="sigmoid").config
    with pytest.raises(ModelError, match="cannot take over the model's noise schedule"):
        make_scheduler("unipc", config)
