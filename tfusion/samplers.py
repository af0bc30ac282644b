"""The sampling side: from noise to latents, one step at a time, by diffusers' schedulers.

`Sampler` makes the scheduler of a (family, name) pair from the process's own settings, chooses the timesteps,
and converts what the network predicts to what that scheduler expects. Any other pair raises: diffusers itself
would take it and give garbage silently.

| name  | family | diffusers' scheduler            | method                                    |
|-------|--------|---------------------------------|-------------------------------------------|
| ddpm  | ddpm   | DDPMScheduler                   | ancestral sampling (the paper: 250 steps) |
| ddim  | ddpm   | DDIMScheduler                   | DDIM, eta = 0                             |
| dpmpp | both   | DPMSolverMultistepScheduler     | DPM-Solver++(2M)                          |
| euler | flow   | FlowMatchEulerDiscreteScheduler | Euler                                     |

**Where sampling starts.** x_0 from epsilon is (x_t - sigma * epsilon) / alpha, so close to pure noise the
network's error is divided by almost nothing (cosine schedule: 4.9e-5 at t = 999; flow: 0 at t = 1000), and an
error of 1 % makes the std of the samples 6 to 20 instead of 1. So sampling from `epsilon` starts where
log(alpha / sigma) reaches -5.1 (diffusers' `lambda_min_clipped`): t = 995 on the cosine schedule, t = 994 in
flow. The other predictions have no such division and start at pure noise ("trailing" spacing).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from tfusion.diffusion import Family, NoiseProcess, PredictionType

SamplerName = Literal["ddpm", "ddim", "dpmpp", "euler"]

_AVAILABLE: dict[Family, tuple[SamplerName, ...]] = {
    "ddpm": ("ddpm", "ddim", "dpmpp"),
    "flow": ("euler", "dpmpp"),
}
# What `.step` is given: x_0, with which every ddpm scheduler works inside; the velocity, which Euler follows.
_STEP_PREDICTION: dict[Family, PredictionType] = {"ddpm": "sample", "flow": "flow_prediction"}
_LAMBDA_MIN = -5.1  # of log(alpha / sigma), see above


class Sampler:
    """Denoise one batch of images. Make a new one for each batch: schedulers keep state between steps.

        x_t = noise  # (I, C, h, w), standard normal
        for index, timestep in enumerate(sampler.timesteps):
            x_t = sampler.step(network(x_t, timestep), index, x_t, generators)

    Args:
        process: what the network was trained with.
        name: the method, see the table above; None = the family's first, `ddpm` or `euler`.
        num_steps: number of network evaluations, 1 ... num_train_timesteps. `ddim` needs a divisor of
            num_train_timesteps. With `epsilon` on the cosine schedule `dpmpp` has at most 996, and `ddim` at
            most 500; it should have 50, as it starts one stride below 1000, and fewer start far from noise.

    Attributes:
        timesteps: num_steps floats, falling: what the network is to be told at each step (convention:
            `diffusion.py`; ddpm whole numbers, flow sigma * 1000).

    Raises:
        ValueError: for a sampler that the family does not have, or a number of steps that it cannot take.
    """

    def __init__(self, process: NoiseProcess, name: SamplerName | None, num_steps: int) -> None:
        available = _AVAILABLE[process.family]
        name = available[0] if name is None else name
        if name not in available:
            raise ValueError(
                f"sampler {name!r} does not exist for the {process.family} family; available: {', '.join(available)}."
            )
        if not 1 <= num_steps <= process.num_train_timesteps:
            raise ValueError(f"num_steps={num_steps}; expected 1 ... {process.num_train_timesteps}.")
        self.process = process
        self.name = name
        self._next_index = 0
        make = _make_flow if process.family == "flow" else _make_ddpm
        self._scheduler, self.timesteps = make(process, name, num_steps)

    def step(
        self,
        model_output: Tensor,
        index: int,
        x_t: Tensor,
        generators: list[torch.Generator] | None = None,
    ) -> Tensor:
        """Go one step towards the clean latents.

        Args:
            model_output: (I, C, h, w), `process.prediction_type` for x_t, as told `timesteps[index]`.
            index: 0, 1, ... in order.
            x_t: (I, C, h, w).
            generators: one an image, for the noise of `ddpm`, so that an image does not depend on its batch.
                The other samplers draw nothing and ignore them; None will do.

        Returns:
            The next x_t (I, C, h, w), fp32 or float64; after the last step, x_0.
        """
        if index != self._next_index or index >= len(self.timesteps):
            raise ValueError(
                f"got step {index}, expected step {self._next_index} of {len(self.timesteps)}: steps go in "
                "order, and each batch of images needs a new Sampler."
            )
        if self.name == "ddpm" and len(generators or ()) != len(x_t):
            raise ValueError(f"got {len(generators or ())} generators; ddpm needs one an image: {len(x_t)}.")
        self._next_index += 1
        timestep = self.timesteps[index]
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        timesteps = torch.full(x_t.shape[:1], timestep, dtype=dtype, device=x_t.device)
        output = self.process.convert(model_output, x_t, timesteps, _STEP_PREDICTION[self.process.family])
        if self.process.family == "flow":
            return self._scheduler.step(output, timestep, x_t).prev_sample
        output = self._clip(output)
        draws = {"generator": generators} if self.name == "ddpm" else {}
        return self._scheduler.step(output, int(timestep), x_t, **draws).prev_sample

    def _clip(self, x_0: Tensor) -> Tensor:
        """Clip a predicted x_0 if the noise scheduler asks for it, as it may for pixels in [-1, 1]."""
        config = self.process.noise_scheduler.config
        return x_0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x_0


def _make_ddpm(process: NoiseProcess, name: SamplerName, num_steps: int) -> tuple[Any, list[float]]:
    """Return a scheduler with the process's own betas, and its timesteps."""
    total = process.num_train_timesteps
    settings = {
        "num_train_timesteps": total,
        "trained_betas": process.noise_scheduler.betas.tolist(),
        "prediction_type": _STEP_PREDICTION["ddpm"],
    }
    usable = _num_usable_timesteps(process)
    if name == "ddim":
        # DDIMScheduler takes no timesteps of ours and always steps by total // num_steps. With "leading" it
        # starts one stride below 1000, which is too little with 1000 steps (1 % error: std 4 % too large).
        spacing = "trailing" if usable == total else "leading"
        most = total if spacing == "trailing" else total // 2
        if total % num_steps or num_steps > most:
            raise ValueError(
                f"num_steps={num_steps}; expected a divisor of {total}, at most {most}, for ddim with "
                f"{process.prediction_type}. Use one, or dpmpp."
            )
        scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing, **settings)
        scheduler.set_timesteps(num_steps)
        return scheduler, [float(t) for t in scheduler.timesteps.tolist()]
    if name == "ddpm":
        scheduler = DDPMScheduler(clip_sample=False, **settings)
        # The whole chain is allowed: ancestral noise drowns an error made close to pure noise.
        usable = max(usable, num_steps)
    else:
        scheduler = DPMSolverMultistepScheduler(**settings)
    if num_steps > usable:
        raise ValueError(f"num_steps={num_steps}; expected at most {usable} for {name} with epsilon.")
    timesteps = _trailing(usable, num_steps)
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler, [float(t) for t in timesteps]


def _make_flow(process: NoiseProcess, name: SamplerName, num_steps: int) -> tuple[Any, list[float]]:
    """Return a scheduler with the process's own shift, and its timesteps: sigma * 1000."""
    shift = process.noise_scheduler.config.shift
    clipped = process.prediction_type == "epsilon"
    # Before the shift, which adds log(shift) to log(sigma / alpha).
    start = 1 / (1 + shift * math.exp(_LAMBDA_MIN)) if clipped else 1.0
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(process.num_train_timesteps, shift=shift)
        # diffusers' own default ends at sigma = 0.001, a step that does nothing.
        scheduler.set_timesteps(sigmas=np.linspace(start, start / num_steps, num_steps).tolist())
    else:
        # Its sigmas start at 1 - 1 / num_train_timesteps; with flow sigmas that number does nothing else.
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=round(1 / (1 - start)) if clipped else process.num_train_timesteps,
            prediction_type=_STEP_PREDICTION["flow"],
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)  # else it looks the step up by its timestep, which is not unique in dpmpp
    sigmas = scheduler.sigmas[:-1].double()
    return scheduler, (sigmas * process.num_train_timesteps).tolist()


def _num_usable_timesteps(process: NoiseProcess) -> int:
    """Return how many of the timesteps 0, 1, ... may be used: with epsilon, log(alpha / sigma) >= -5.1."""
    if process.prediction_type != "epsilon":
        return process.num_train_timesteps
    alpha, sigma = process.alpha_sigma(torch.arange(process.num_train_timesteps, dtype=torch.float64))
    return int((alpha.log() - sigma.log() >= _LAMBDA_MIN).sum())


def _trailing(usable: int, num_steps: int) -> list[int]:
    """Return num_steps timesteps from usable - 1 down, evenly spaced, the last one stride above -1.

    As diffusers' "trailing", whose float range for some numbers (61 of 1000) has one timestep too many: -1.
    """
    return [round(usable - step * usable / num_steps) - 1 for step in range(num_steps)]
