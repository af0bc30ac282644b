"""The training side of a noise scheduler: timesteps, noising, targets, conversions between predictions.

Two families stand behind one interface, both of the form `x_t = alpha * x_0 + sigma * noise`:

- ddpm (diffusers' `DDPMScheduler`; DDPM eq. 4): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), integer t.
- flow (diffusers' `FlowMatchEulerDiscreteScheduler`; rectified flow): sigma = t / 1000, alpha = 1 - sigma,
  real t.

**Time direction**, said here once: timestep 0 is clean, `num_train_timesteps` (1000) is noise, in both
families. The network is always told this number. ddpm uses 0 ... 999 (t = 0 already has a little noise: sigma
is 0.006 on the cosine schedule), flow the open interval (0, 1000).

A network may predict, in either family (diffusers' words): `epsilon` = noise, `sample` = x_0,
`v_prediction` = alpha * noise - sigma * x_0, `flow_prediction` = noise - x_0.

Sampling is in `samplers.py`. Nothing here draws random numbers. Shapes: I images, C, h, w latent channels and
size. Coefficients are fp32, or float64 where the input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

Family = Literal["ddpm", "flow"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
TimestepSampling = Literal["uniform", "logit_normal"]

# Exact classes: diffusers' schedulers share no base class that tells the family.
_FAMILIES: dict[type, Family] = {DDPMScheduler: "ddpm", FlowMatchEulerDiscreteScheduler: "flow"}

# Settings of the noise scheduler that nothing would obey: refused, lest they be silently ignored.
_REQUIRED: dict[Family, dict[str, Any]] = {
    "ddpm": {
        "thresholding": False,
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",  # diffusers' default; Sampler chooses by the prediction type
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,  # abar_999 = 0: epsilon and DPM-Solver++ divide by it
    },
    "flow": {
        "use_dynamic_shifting": False,
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "stochastic_sampling": False,
    },
}

# Uniforms are kept this far from 0 and 1: the inverse normal CDF is infinite there, and flow excludes both.
_UNIFORM_MARGIN = 1e-6
# epsilon says nothing of x_0 where alpha = 0, nor x_0 of the noise where sigma = 0. Only these two divisors
# are clamped, to stay finite, below every value of the cosine schedule (alpha >= 4.9e-5, sigma >= 6.4e-3).
_MIN_DIVISOR = 1e-5


class NoiseProcess:
    """Say how latents are noised and what the network learns to predict.

    A plain class, so that nothing of it enters a `state_dict`.

    Args:
        noise_scheduler: `DDPMScheduler` (the paper: `squaredcos_cap_v2`, 1000 timesteps; `clip_sample=False`)
            or `FlowMatchEulerDiscreteScheduler`. It decides the family. flow's `shift` acts on sampling only;
            its like in training is `timestep_sampling="logit_normal"` with `logit_mean = log(shift)`.
        prediction_type: what the network predicts. A `DDPMScheduler` must be configured with the same, or be
            left at `epsilon` for `flow_prediction`, for which it has no word.
        timestep_sampling: distribution of the training timesteps over their range.
        logit_mean: mean of logit(t / 1000) before the limit, for `logit_normal`. Positive means noisier.
        logit_std: standard deviation of the same, > 0.
        latents_are_pixels: latents are pixels in [-1, 1]. Only then may the `DDPMScheduler` have
            `clip_sample=True`, which makes samplers clip every predicted x_0.

    Raises:
        ValueError: for a scheduler of another class, a configuration that contradicts the arguments or that
            nothing obeys, tables on the meta device, or an argument out of its range.
    """

    def __init__(
        self,
        noise_scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
        prediction_type: PredictionType = "epsilon",
        timestep_sampling: TimestepSampling = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        latents_are_pixels: bool = False,
    ) -> None:
        if type(noise_scheduler) not in _FAMILIES:
            names = ", ".join(cls.__name__ for cls in _FAMILIES)
            raise ValueError(f"noise_scheduler is a {type(noise_scheduler).__name__}; expected one of {names}.")
        _check_choice("prediction_type", prediction_type, PredictionType)
        _check_choice("timestep_sampling", timestep_sampling, TimestepSampling)
        if not (math.isfinite(logit_mean) and math.isfinite(logit_std) and logit_std > 0):
            raise ValueError(
                f"logit_mean={logit_mean}, logit_std={logit_std}; expected finite values and logit_std > 0."
            )
        self.family = _FAMILIES[type(noise_scheduler)]
        _check_config(self.family, noise_scheduler.config, prediction_type, latents_are_pixels)
        self.noise_scheduler = noise_scheduler
        self.prediction_type = prediction_type
        self.timestep_sampling = timestep_sampling
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.num_train_timesteps: int = noise_scheduler.config.num_train_timesteps
        self._alphas_cumprod: dict[torch.device, Tensor] = {}  # one copy a device, so that no step copies it again
        if self.family == "ddpm":
            table = noise_scheduler.alphas_cumprod
            if table.is_meta:
                raise ValueError("noise_scheduler was made under torch.device('meta'); make it outside.")
            self._alphas_cumprod[torch.device("cpu")] = table.detach().to("cpu", torch.float32).clone()

    def sample_timesteps(self, uniforms: Tensor, limits: Tensor) -> Tensor:
        """Turn uniforms in [0, 1) into timesteps, each at most its image's limit * 1000.

        The limit scales time: the distribution is squeezed into [0, limit], not cut off there, so a limit of
        0.5 gives t = 0 ... 499 in ddpm (the paper's "t <= 500") and (0, 500) in flow. A limit of 0 gives
        exactly 0, the timestep of a clean image, for which `add_noise` wants `clean`.

        Args:
            uniforms: (I,).
            limits: (I,), fractions of the range in [0, 1]; 1 is the whole range.

        Returns:
            (I,) fp32 or float64; whole numbers in ddpm.
        """
        if uniforms.shape != limits.shape or uniforms.dim() != 1:
            raise ValueError(f"uniforms {tuple(uniforms.shape)} and limits {tuple(limits.shape)}; expected both (I,).")
        dtype = torch.promote_types(uniforms.dtype, torch.float32)
        fractions = uniforms.to(dtype).clamp(_UNIFORM_MARGIN, 1 - _UNIFORM_MARGIN)
        if self.timestep_sampling == "logit_normal":  # Stable Diffusion 3, eq. 19, by the inverse of its CDF
            fractions = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(fractions))
        timesteps = fractions * limits.to(dtype) * self.num_train_timesteps
        if self.family == "ddpm":
            timesteps = timesteps.floor().clamp(max=self.num_train_timesteps - 1)
        return timesteps

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of `x_t = alpha * x_0 + sigma * noise`, each (I,), for timesteps (I,)."""
        dtype = torch.promote_types(timesteps.dtype, torch.float32)
        if self.family == "flow":
            sigma = timesteps.to(dtype) / self.num_train_timesteps
            return 1 - sigma, sigma
        alphas_cumprod = self._table(timesteps.device)[timesteps.long()].to(dtype)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor, clean: Tensor | None = None) -> Tensor:
        """Noise latents to their timesteps.

        Args:
            x_0: (I, C, h, w).
            noise: (I, C, h, w), standard normal.
            timesteps: (I,).
            clean: (I,) bool, images to return exactly as they are (their limit is 0). ddpm needs it, for its
                timestep 0 is noised. None: every image is noised.

        Returns:
            x_t (I, C, h, w), fp32 or float64.
        """
        alpha, sigma, x_0, noise = self._coefficients(timesteps, x_0, noise)
        x_t = alpha * x_0 + sigma * noise
        return x_t if clean is None else torch.where(_per_image(clean, x_0), x_0, x_t)

    def target(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should output, (I, C, h, w), fp32 or float64; arguments as `add_noise`."""
        alpha, sigma, x_0, noise = self._coefficients(timesteps, x_0, noise)
        return _prediction(self.prediction_type, x_0, noise, alpha, sigma)

    def convert(self, model_output: Tensor, x_t: Tensor, timesteps: Tensor, to: PredictionType) -> Tensor:
        """Express the network's output as another prediction.

        Exact where it is defined. It is not, from `epsilon` at alpha = 0 (flow, t = 1000) and from `sample`
        at sigma = 0 (flow, t = 0): there the divisor is clamped to 1e-5 and the result is merely finite.

        Args:
            model_output: (I, C, h, w), of `self.prediction_type`.
            x_t: (I, C, h, w), what the network was given.
            timesteps: (I,), what the network was told.
            to: the prediction wanted.

        Returns:
            (I, C, h, w), fp32 or float64.
        """
        _check_choice("to", to, PredictionType)
        alpha, sigma, x_t, model_output = self._coefficients(timesteps, x_t, model_output)
        if to == self.prediction_type:
            return model_output
        x_0, noise = _solve(self.prediction_type, model_output, x_t, alpha, sigma)
        return _prediction(to, x_0, noise, alpha, sigma)

    def _table(self, device: torch.device) -> Tensor:
        """Return abar (num_train_timesteps,) on a device."""
        if device not in self._alphas_cumprod:
            self._alphas_cumprod[device] = self._alphas_cumprod[torch.device("cpu")].to(device)
        return self._alphas_cumprod[device]

    def _coefficients(self, timesteps: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma (I, 1, 1, 1) and both tensors (I, C, h, w) in fp32, or float64 if `a` is."""
        if a.shape != b.shape or timesteps.shape != a.shape[:1]:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (a, b, timesteps))
            raise ValueError(f"got shapes {shapes}; expected twice (I, C, h, w), and timesteps (I,).")
        dtype = torch.promote_types(a.dtype, torch.float32)
        alpha, sigma = (_per_image(c.to(dtype), a) for c in self.alpha_sigma(timesteps.to(dtype)))
        return alpha, sigma, a.to(dtype), b.to(dtype)


def _solve(kind: PredictionType, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `x_t = alpha * x_0 + sigma * noise` and the definition of `kind` for x_0 and noise."""
    if kind == "epsilon":
        return (x_t - sigma * output) / alpha.clamp(min=_MIN_DIVISOR), output
    if kind == "sample":
        return output, (x_t - alpha * output) / sigma.clamp(min=_MIN_DIVISOR)
    if kind == "v_prediction":
        square = alpha**2 + sigma**2  # 1 in ddpm, >= 1/2 in flow
        return (alpha * x_t - sigma * output) / square, (sigma * x_t + alpha * output) / square
    total = alpha + sigma  # flow_prediction: 1 in flow, >= 1 in ddpm
    return (x_t - sigma * output) / total, (x_t + alpha * output) / total


def _prediction(kind: PredictionType, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the definition of `kind`."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x_0
    if kind == "v_prediction":  # Salimans & Ho, arXiv 2202.00512, appendix D
        return alpha * noise - sigma * x_0
    return noise - x_0


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """(I,) -> (I, 1, 1, 1), to multiply a tensor `like` (I, C, h, w)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(get_args(choices))}.")


def _check_config(
    family: Family, config: Mapping[str, Any], prediction_type: PredictionType, latents_are_pixels: bool
) -> None:
    """Refuse a scheduler configuration that contradicts us or that nothing would obey."""
    for key, expected in _REQUIRED[family].items():
        if config[key] != expected:
            raise ValueError(f"noise_scheduler has {key}={config[key]!r}, not supported; set {expected!r}.")
    if family == "flow":
        return
    stated = "epsilon" if prediction_type == "flow_prediction" else prediction_type
    if config["prediction_type"] != stated:
        raise ValueError(
            f"prediction_type={prediction_type!r}, but that of the noise_scheduler is "
            f"{config['prediction_type']!r}; set it to {stated!r} there."
        )
    if config["clip_sample"] and not latents_are_pixels:
        raise ValueError(
            "noise_scheduler has clip_sample=True (diffusers' default), which clips every predicted x_0 to "
            f"+-{config['clip_sample_range']} while sampling and so ruins latents that go beyond. Set "
            "clip_sample=False, or latents_are_pixels=True if the latents are pixels in [-1, 1]."
        )
