"""Every sampler reaches the data from every prediction, equals diffusers, and treats each row alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from tfusion.diffusion import NoiseProcess
from tfusion.samplers import Sampler

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
NUM_STEPS = {"ddpm": 250, "ddim": 50, "dpmpp": 50, "euler": 50}
PAIRS = [("ddpm", "ddpm"), ("ddpm", "ddim"), ("ddpm", "dpmpp"), ("flow", "euler"), ("flow", "dpmpp")]
every_pair = pytest.mark.parametrize(("family", "name"), PAIRS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def make_process(family: str, prediction: str = "epsilon", shift: float = 1.0, **kwargs) -> NoiseProcess:
    if family == "flow":
        return NoiseProcess(FlowMatchEulerDiscreteScheduler(shift=shift), prediction)
    stated = "epsilon" if prediction == "flow_prediction" else prediction
    config = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "prediction_type": stated}
    return NoiseProcess(DDPMScheduler(**config | kwargs), prediction)


def alpha_sigma(family: str, timestep: float) -> tuple[float, float]:
    """Return the coefficients from diffusers' table or the definition, not from the code under test."""
    if family == "flow":
        return 1 - timestep / 1000, timestep / 1000
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    abar = scheduler.alphas_cumprod[int(timestep)].double().item()
    return math.sqrt(abar), math.sqrt(1 - abar)


def gaussian_network(family: str, prediction: str, mean: float, std: float, error: float = 0.0):
    """Return the perfect network for data N(mean, std^2): the closed-form posterior mean of what it predicts.

    error: relative noise on its output. std = 0 is a single data point.
    """
    generator = torch.Generator().manual_seed(7)

    def network(x_t: Tensor, timestep: float) -> Tensor:
        alpha, sigma = alpha_sigma(family, timestep)
        surprise = (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x_0, noise = mean + alpha * std**2 * surprise, sigma * surprise
        output = {
            "epsilon": noise,
            "sample": x_0,
            "v_prediction": alpha * noise - sigma * x_0,
            "flow_prediction": noise - x_0,
        }[prediction]
        return output * (1 + error * torch.randn(output.shape, generator=generator)) if error else output

    return network


def sample(sampler: Sampler, network, x_t: Tensor, seeds: list[int] | None = None) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(1000, 1000 + len(x_t))]
    for index, timestep in enumerate(sampler.timesteps):
        x_t = sampler.step(network(x_t, timestep), index, x_t, generators)
    return x_t


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_pair
@every_prediction
@pytest.mark.parametrize("error", [0.0, 0.01], ids=["exact", "noisy"])
def test_gaussian_data_comes_out_with_its_mean_and_std(family, name, prediction, error):
    """A relative error of 1 % on the output must not be blown up near pure noise, where alpha is tiny."""
    mean, std = 0.5, 1.0
    x = normal(8, 1, 64, 64)
    x = (x - x.mean()) / x.std()  # so that only ddpm's own noise and the solver's error remain
    sampler = Sampler(make_process(family, prediction), name, NUM_STEPS[name])
    x_0 = sample(sampler, gaussian_network(family, prediction, mean, std, error), x)
    assert x_0.mean().item() == pytest.approx(mean, abs=0.03 * std)
    assert x_0.std().item() == pytest.approx(std, rel=0.03)


@every_pair
@every_prediction
@pytest.mark.parametrize("num_steps", [10, 50])
def test_a_single_data_point_is_recovered(family, name, prediction, num_steps):
    network = gaussian_network(family, prediction, mean=0.7, std=0.0)
    x_0 = sample(Sampler(make_process(family, prediction), name, num_steps), network, normal(2, 3, 4, 4))
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.7), rtol=0, atol=1e-4)


@every_prediction
def test_flow_shift_still_reaches_the_data(prediction):
    for name in ("euler", "dpmpp"):
        sampler = Sampler(make_process("flow", prediction, shift=3.0), name, 100)
        x_0 = sample(sampler, gaussian_network("flow", prediction, 0.5, 1.0, error=0.01), normal(8, 1, 64, 64))
        assert x_0.mean().item() == pytest.approx(0.5, abs=0.03)
        assert x_0.std().item() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "native"), [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
def test_ddpm_and_ddim_steps_equal_diffusers_own_conversion(name, native, prediction):
    sampler = Sampler(make_process("ddpm", prediction), name, 50)
    scheduler = native(beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type=prediction)
    if name == "ddpm":
        scheduler.set_timesteps(timesteps=[int(t) for t in sampler.timesteps])
    else:
        scheduler.set_timesteps(50)
        scheduler.timesteps = torch.tensor(sampler.timesteps).long()
    x = normal(2, 3, 4, 4)
    for index, timestep in enumerate(sampler.timesteps):
        output = normal(2, 3, 4, 4, seed=100 + index)
        expected = scheduler.step(output, int(timestep), x, generator=generators([index, 9])).prev_sample
        actual = sampler.step(output, index, x, generators([index, 9]))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
        x = normal(2, 3, 4, 4, seed=200 + index)


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_dpmpp_equals_diffusers_own_conversion(prediction):
    sampler = Sampler(make_process("ddpm", prediction), "dpmpp", 20)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    scheduler.set_timesteps(timesteps=[int(t) for t in sampler.timesteps])
    compare_trajectories(sampler, scheduler, scheduler.timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_samplers_equal_diffusers(shift):
    process = make_process("flow", "flow_prediction", shift)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    euler.set_timesteps(sigmas=[1 - step / 20 for step in range(20)])
    compare_trajectories(Sampler(process, "euler", 20), euler, euler.timesteps)
    dpmpp = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    dpmpp.set_timesteps(20)
    compare_trajectories(Sampler(process, "dpmpp", 20), dpmpp, dpmpp.timesteps)


def compare_trajectories(sampler: Sampler, scheduler, timesteps: Tensor) -> None:
    """Give both the same network outputs from the same noise."""
    actual = expected = normal(2, 3, 4, 4)
    for index, timestep in enumerate(timesteps):
        output = normal(2, 3, 4, 4, seed=100 + index)
        expected = scheduler.step(output, timestep, expected).prev_sample
        actual = sampler.step(output, index, actual)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_clipping_for_pixels_equals_diffusers():
    config = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": 0.5}
    sampler = Sampler(NoiseProcess(DDPMScheduler(**config), latents_are_pixels=True), "ddpm", 250)
    scheduler = DDPMScheduler(**config)
    scheduler.set_timesteps(timesteps=[int(t) for t in sampler.timesteps])
    x, output = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    expected = scheduler.step(output, int(sampler.timesteps[0]), x, generator=generators([0, 1])).prev_sample
    torch.testing.assert_close(sampler.step(output, 0, x, generators([0, 1])), expected)


@every_pair
def test_a_row_of_a_batch_equals_the_row_alone(family, name):
    x, seeds = normal(3, 2, 4, 4), [11, 12, 13]
    process = make_process(family, "v_prediction")
    network = gaussian_network(family, "v_prediction", 0.5, 1.0)
    together = sample(Sampler(process, name, 10), network, x, seeds)
    for row in range(3):
        alone = sample(Sampler(process, name, 10), network, x[row : row + 1], seeds[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_ddpm_noise_comes_from_the_rows_generators():
    x = normal(1, 2, 4, 4).expand(2, -1, -1, -1)
    network = gaussian_network("ddpm", "epsilon", 0.5, 1.0)
    a = sample(Sampler(make_process("ddpm"), "ddpm", 10), network, x, [1, 2])
    b = sample(Sampler(make_process("ddpm"), "ddpm", 10), network, x, [2, 1])
    assert torch.equal(a[0], b[1])
    assert torch.equal(a[1], b[0])
    assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize(
    ("family", "name", "prediction", "num_steps", "first", "last"),
    [
        ("ddpm", "ddpm", "epsilon", 250, 995, 3),
        ("ddpm", "ddpm", "v_prediction", 250, 999, 3),
        ("ddpm", "ddpm", "epsilon", 1000, 999, 0),
        ("ddpm", "ddim", "epsilon", 50, 980, 0),
        ("ddpm", "ddim", "flow_prediction", 50, 999, 19),
        ("ddpm", "ddim", "flow_prediction", 1000, 999, 0),
        ("ddpm", "dpmpp", "epsilon", 996, 995, 0),
        ("ddpm", "dpmpp", "sample", 50, 999, 19),
        ("flow", "euler", "flow_prediction", 50, 1000, 20),
        ("flow", "euler", "epsilon", 50, 1000 / (1 + math.exp(-5.1)), 20 / (1 + math.exp(-5.1))),
        ("flow", "dpmpp", "v_prediction", 50, 999, 19.98),
        ("flow", "dpmpp", "epsilon", 50, 1000 * 164 / 165, 20 * 164 / 165),
    ],
)
def test_timesteps_start_and_end_where_the_prediction_allows(family, name, prediction, num_steps, first, last):
    timesteps = Sampler(make_process(family, prediction), name, num_steps).timesteps
    assert len(timesteps) == num_steps
    assert all(isinstance(t, float) for t in timesteps)
    assert (timesteps[0], timesteps[-1]) == pytest.approx((first, last), rel=1e-5)
    assert all(a > b for a, b in itertools.pairwise(timesteps))


def test_epsilon_on_a_schedule_that_ends_above_the_threshold_is_not_clipped():
    process = make_process("ddpm", beta_schedule="linear")  # log(alpha / sigma) ends at -5.06
    assert Sampler(process, "dpmpp", 50).timesteps[0] == Sampler(process, "ddim", 50).timesteps[0] == 999


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 61, 121, 333, 999, 1000])
def test_any_number_of_ddpm_steps_is_exact(num_steps):
    """diffusers' own "trailing" gives 62 timesteps for 61, the last being -1."""
    timesteps = Sampler(make_process("ddpm", "v_prediction"), "ddpm", num_steps).timesteps
    assert len(set(timesteps)) == num_steps
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0


@every_pair
def test_steps_ask_the_device_for_no_value(family, name):
    """Tensors on the meta device have no values, so that any host sync raises."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    sampler = Sampler(make_process(family), name, 4)
    for index in range(4):
        x = sampler.step(x, index, x, generators([0, 1]))
    assert x.device.type == "meta"


@pytest.mark.parametrize(
    ("family", "name", "num_steps", "match"),
    [
        ("ddpm", "euler", 50, "'euler' does not exist for the ddpm family; available: ddpm, ddim, dpmpp"),
        ("flow", "ddpm", 50, "'ddpm' does not exist for the flow family; available: euler, dpmpp"),
        ("flow", "ddim", 50, "'ddim' does not exist for the flow family; available: euler, dpmpp"),
        ("flow", "heun", 50, "'heun' does not exist"),
        ("ddpm", "ddpm", 0, r"num_steps=0; expected 1 \.\.\. 1000"),
        ("flow", "euler", 1001, r"num_steps=1001; expected 1 \.\.\. 1000"),
        ("ddpm", "ddim", 30, "num_steps=30; expected a divisor of 1000, at most 500, for ddim with epsilon"),
        (
            "ddpm",
            "ddim",
            1000,
            "num_steps=1000; expected a divisor of 1000, at most 500, for ddim with epsilon",
        ),
        ("ddpm", "dpmpp", 997, "num_steps=997; expected at most 996 for dpmpp with epsilon"),
    ],
)
def test_what_cannot_be_sampled_is_refused(family, name, num_steps, match):
    with pytest.raises(ValueError, match=match):
        Sampler(make_process(family), name, num_steps)


def test_steps_out_of_order_and_missing_generators_are_refused():
    x = normal(2, 1, 4, 4)
    sampler = Sampler(make_process("ddpm"), "ddpm", 2)
    with pytest.raises(ValueError, match="got step 1, expected step 0 of 2"):
        sampler.step(x, 1, x, generators([0, 1]))
    with pytest.raises(ValueError, match="got 1 generators; ddpm needs one an image: 2"):
        sampler.step(x, 0, x, generators([0]))
    for index in range(2):
        sampler.step(x, index, x, generators([0, 1]))
    with pytest.raises(ValueError, match="needs a new Sampler"):
        sampler.step(x, 2, x, generators([0, 1]))
