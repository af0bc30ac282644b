"""NoiseProcess equals diffusers and the closed forms: schedules, noising, targets, conversions, timesteps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tfusion.diffusion import NoiseProcess

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def make_process(family: str, prediction_type: str = "epsilon", **kwargs) -> NoiseProcess:
    if family == "flow":
        return NoiseProcess(FlowMatchEulerDiscreteScheduler(), prediction_type, **kwargs)
    stated = "epsilon" if prediction_type == "flow_prediction" else prediction_type
    return NoiseProcess(cosine(prediction_type=stated), prediction_type, **kwargs)


def cosine(**kwargs) -> DDPMScheduler:
    return DDPMScheduler(**{"beta_schedule": "squaredcos_cap_v2", "clip_sample": False} | kwargs)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_cosine_schedule_is_the_closed_form():
    t = torch.arange(1000)
    alpha, sigma = make_process("ddpm").alpha_sigma(t.double())
    # Nichol & Dhariwal eq. 17 at time (t + 1) / 1000, as diffusers tabulates it; the last beta is capped.
    f = torch.cos(((t.double() + 1) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    closed = f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    torch.testing.assert_close(alpha[:-1] ** 2, closed[:-1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(alpha**2, cosine().alphas_cumprod.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_ddpm_add_noise_equals_diffusers(schedule):
    scheduler = cosine(beta_schedule=schedule)
    x_0, noise, t = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(
        NoiseProcess(scheduler).add_noise(x_0, noise, t.float()),
        scheduler.add_noise(x_0, noise, t),
        rtol=1e-6,
        atol=1e-7,
    )


def test_flow_add_noise_equals_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    x_0, noise, t = normal(4, 3, 4, 4), normal(4, 3, 4, 4, seed=1), scheduler.timesteps[[0, 1, 500, 999]]
    torch.testing.assert_close(
        NoiseProcess(scheduler, "flow_prediction").add_noise(x_0, noise, t),
        scheduler.scale_noise(x_0, t, noise),
    )


@pytest.mark.parametrize("family", ["ddpm", "flow"])
@pytest.mark.parametrize("t", [0.0, 250.0, 999.0])
def test_moments_of_x_t(family, t):
    process = make_process(family)
    x_0, t = torch.full((4, 1, 128, 128), 2.0), torch.full((4,), t)
    x_t = process.add_noise(x_0, normal(4, 1, 128, 128), t)
    alpha, sigma = process.alpha_sigma(t)
    assert x_t.mean().item() == pytest.approx(2 * alpha[0].item(), abs=0.01)
    assert x_t.std().item() == pytest.approx(sigma[0].item(), rel=0.01, abs=1e-6)


@pytest.mark.parametrize("family", ["ddpm", "flow"])
def test_clean_images_come_back_exactly(family):
    process = make_process(family)
    x_0, noise = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    t = torch.tensor([0.0, 0.0, 500.0])
    x_t = process.add_noise(x_0, noise, t, clean=torch.tensor([True, False, False]))
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[1:], process.add_noise(x_0, noise, t)[1:])
    assert torch.equal(x_t[1], x_0[1]) == (family == "flow")  # ddpm's timestep 0 has noise


def test_targets():
    x_0, noise, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([1.0, 500.0, 999.0])
    for family in ("ddpm", "flow"):
        assert torch.equal(make_process(family, "epsilon").target(x_0, noise, t), noise)
        assert torch.equal(make_process(family, "sample").target(x_0, noise, t), x_0)
        assert torch.equal(make_process(family, "flow_prediction").target(x_0, noise, t), noise - x_0)
    velocity = cosine().get_velocity(x_0, noise, t.long())
    torch.testing.assert_close(make_process("ddpm", "v_prediction").target(x_0, noise, t), velocity)
    sigma = t.view(-1, 1, 1, 1) / 1000
    expected = (1 - sigma) * noise - sigma * x_0
    torch.testing.assert_close(make_process("flow", "v_prediction").target(x_0, noise, t), expected)


@pytest.mark.parametrize("family", ["ddpm", "flow"])
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("to", PREDICTIONS)
def test_conversions_reach_the_target_and_come_back(family, source, to):
    process, back = make_process(family, source), make_process(family, to)
    t = torch.tensor([0.0 if family == "ddpm" else 1.0, 250.0, 700.0, 998.0, 999.0], dtype=torch.float64)
    x_0, noise = normal(5, 2, 4, 4, dtype=torch.float64), normal(5, 2, 4, 4, seed=1, dtype=torch.float64)
    x_t, output = process.add_noise(x_0, noise, t), process.target(x_0, noise, t)
    converted = process.convert(output, x_t, t, to)
    torch.testing.assert_close(converted, back.target(x_0, noise, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back.convert(converted, x_t, t, source), output, rtol=1e-10, atol=1e-10)
    assert converted.dtype == torch.float64


def test_conversion_stays_finite_where_it_is_undefined():
    x_t = normal(1, 2, 4, 4)
    x_0 = make_process("flow", "epsilon").convert(x_t + 0.1, x_t, torch.tensor([1000.0]), "sample")
    noise = make_process("flow", "sample").convert(x_t + 0.1, x_t, torch.tensor([0.0]), "epsilon")
    assert x_0.isfinite().all()
    assert noise.isfinite().all()


def test_low_precision_is_computed_in_fp32():
    process = make_process("ddpm", "v_prediction")
    x_0, noise, t = normal(2, 2, 4, 4), normal(2, 2, 4, 4, seed=1), torch.tensor([3.0, 900.0])
    low = process.target(x_0.bfloat16(), noise.bfloat16(), t)
    assert low.dtype == torch.float32
    assert torch.equal(low, process.target(x_0.bfloat16().float(), noise.bfloat16().float(), t))


@pytest.mark.parametrize(("limit", "last"), [(1.0, 999), (0.5, 499), (0.25, 249), (0.001, 0)])
def test_ddpm_uniform_timesteps_are_equally_frequent_up_to_the_limit(limit, last):
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = make_process("ddpm").sample_timesteps(uniforms, torch.full_like(uniforms, limit))
    counts = np.bincount(t.long().numpy(), minlength=1000)
    assert torch.equal(t, t.floor())
    assert t.max() <= limit * 1000
    assert np.all(counts[: last + 1] == 100_000 // (last + 1))
    assert counts[last + 1 :].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_uniforms_stay_in_range(dtype):
    uniforms = torch.tensor([0.0, 1 - 2**-24, 1.0], dtype=dtype)
    for family, sampling in itertools.product(("ddpm", "flow"), ("uniform", "logit_normal")):
        process = make_process(family, timestep_sampling=sampling)
        t = process.sample_timesteps(uniforms, torch.ones_like(uniforms))
        assert t.dtype == dtype
        assert t.isfinite().all()
        assert t.min() >= 0
        assert t.max() <= 999 if family == "ddpm" else t.min() > 0 and t.max() < 1000


def test_flow_uniform_timesteps_are_scaled_by_each_images_limit():
    uniforms = torch.tensor([0.25, 0.25, 0.5, 0.9])
    t = make_process("flow").sample_timesteps(uniforms, torch.tensor([1.0, 0.5, 0.0, 0.2]))
    torch.testing.assert_close(t, torch.tensor([250.0, 125.0, 0.0, 180.0]))
    assert t[2] == 0


@pytest.mark.parametrize(("mean", "std", "limit"), [(0.0, 1.0, 1.0), (0.5, 0.8, 1.0), (-0.4, 1.5, 0.5)])
def test_logit_normal_quantiles_equal_scipy(mean, std, limit):
    process = make_process("flow", timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    quantiles = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = process.sample_timesteps(quantiles, torch.full_like(quantiles, limit))
    expected = 1000 * limit * scipy.special.expit(scipy.stats.norm.ppf(quantiles.numpy(), mean, std))
    np.testing.assert_allclose(t.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("family", ["ddpm", "flow"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_nothing_asks_the_device_for_a_value(family, prediction):
    """Tensors on the meta device have no values, so that any host sync raises."""
    process = make_process(family, prediction, timestep_sampling="logit_normal")
    x, ones = torch.empty(3, 2, 4, 4, device="meta"), torch.ones(3, device="meta")
    t = process.sample_timesteps(ones, ones)
    x_t = process.add_noise(x, x, t, clean=t == 0)
    for to in PREDICTIONS:
        assert process.convert(process.target(x, x, t), x_t, t, to).device.type == "meta"


def test_process_enters_no_state_dict():
    module = torch.nn.Linear(1, 1)
    module.process = make_process("ddpm")
    assert set(module.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("scheduler", "kwargs", "match"),
    [
        (DDIMScheduler(), {}, "DDIMScheduler; expected one of DDPMScheduler, Flow"),
        (cosine(clip_sample=True), {}, "clip_sample=True"),
        (cosine(), {"prediction_type": "v_prediction"}, "set it to 'v_prediction' there"),
        (
            cosine(prediction_type="sample"),
            {"prediction_type": "flow_prediction"},
            "set it to 'epsilon' there",
        ),
        (cosine(), {"prediction_type": "eps"}, "prediction_type='eps'; expected one of epsilon"),
        (cosine(), {"timestep_sampling": "cosine"}, "timestep_sampling='cosine'; expected one of uniform"),
        (cosine(), {"logit_std": 0.0}, "logit_std=0.0"),
        (cosine(variance_type="learned"), {}, "variance_type='learned', not supported; set 'fixed_small'"),
        (cosine(timestep_spacing="trailing"), {}, "timestep_spacing='trailing'"),
        (cosine(rescale_betas_zero_snr=True), {}, "rescale_betas_zero_snr=True"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, "use_dynamic_shifting=True"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), {}, "shift_terminal=0.1"),
    ],
)
def test_contradictions_are_refused(scheduler, kwargs, match):
    with pytest.raises(ValueError, match=match):
        NoiseProcess(scheduler, **kwargs)


def test_tables_without_values_are_refused():
    with torch.device("meta"):
        scheduler = cosine()
    with pytest.raises(ValueError, match="meta"):
        NoiseProcess(scheduler)


def test_wrong_arguments_are_refused():
    process, x, t = make_process("ddpm"), normal(2, 1, 4, 4), torch.zeros(2)
    with pytest.raises(ValueError, match=r"\(2,\) and limits \(3,\)"):
        process.sample_timesteps(t, torch.ones(3))
    with pytest.raises(ValueError, match="expected twice"):
        process.add_noise(x, x[:1], t)
    with pytest.raises(ValueError, match="expected twice"):
        process.target(x, x, t[:1])
    with pytest.raises(ValueError, match="to='x_0'; expected one of"):
        process.convert(x, x, t, "x_0")
