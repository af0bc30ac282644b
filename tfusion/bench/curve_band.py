"""Is a curve within the band of a few seeds? The statistics of `tfusion.bench.curve`, on arrays.

A single logged loss is that of one batch, and noisy (20 % late in the quickstart), so means over windows are compared.
With R seeds, x_r(i) the loss of seed r at step i, and logarithms because losses are compared by their ratio:

    c(i)   = mean_r log x_r(i)                                            centre, between logged steps interpolated
    d_r(w) = mean_{i in w} (log x_r(i) - c(i))                            deviation of a seed in window w
    s(w)   = sqrt(sum_{v near w} sum_r d_r(v)^2 / f), f = (R - 1) * number of v    pooled standard deviation
    band   = c +- t(0.995; f) * sqrt(1 + 1/R) * max(s(w), 0.01)

which is the 99 % prediction interval of one further seed (Hahn & Meeker, Statistical Intervals, 1991, 4.7). Windows of
`WINDOW` steps are near w where they are at most `NEAR` windows away: the noise of a loss changes along a run, and a
single window has only R - 1 degrees of freedom, two for three seeds, whose t is of no use (9.9). The floor of 1 % is
for seeds that agree by chance. Where a run is logged more rarely than the reference, its windows have fewer rows and
more noise: s grows by the root of the ratio.

t takes windows as independent. In the shipped training curves they are: neighbours' deviations correlate by -0.10 to
0.04, and no seed lies high or low all along (at most 2 %; F tests, p from 0.27 to 0.70). One window in a hundred is
outside by chance; so a curve is called outside only where `IN_A_ROW` windows in a row are, on the same side. A
validation is a mean over a whole held-out set with averaged weights: it is a window of its own, and one is enough. A
loss that is not a positive number is outside at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.stats import t as student_t

WINDOW = 100  # steps
NEAR = 2  # windows on either side whose deviations are pooled
IN_A_ROW = 3
CONFIDENCE = 0.99
FLOOR = 0.01  # of the standard deviation of a window's mean log loss


@dataclass(frozen=True)
class Curve:
    """Losses as they were logged.

    Attributes:
        steps: (S,) increasing.
        losses: (S,) of a run, (R, S) of a reference of R seeds.
    """

    steps: np.ndarray
    losses: np.ndarray

    def at(self, chosen: np.ndarray) -> Self:
        """The steps that are chosen, (S,) bool."""
        return type(self)(self.steps[chosen], self.losses[..., chosen])


@dataclass(frozen=True)
class Comparison:
    """A curve beside its band, in windows.

    Attributes:
        steps: (W, 2) the first and the last step of the run in each window.
        values: (W,) geometric mean of the run's losses.
        low, high: (W,) the band.
        in_a_row: how many windows must be outside together.
        bad_step: the first step whose loss is not a positive number, and
        bad_loss: that loss; None where there is none.
    """

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    in_a_row: int
    bad_step: int | None = None
    bad_loss: float | None = None

    @property
    def sides(self) -> np.ndarray:
        """(W,) 1 above the band, -1 below, 0 within."""
        return (self.values > self.high).astype(int) - (self.values < self.low)

    def outside(self) -> tuple[int, int] | None:
        """First and last of the first `in_a_row` windows or more in a row that are outside on one side."""
        stretches = self._stretches()
        return next(((a, b) for a, b in stretches if self.sides[a] and b - a + 1 >= self.in_a_row), None)

    def last_outside(self) -> int:
        """How many windows at the end are outside on one side, as the run has come."""
        stretches = self._stretches()
        if not stretches:
            return 0
        first, last = stretches[-1]
        return (last - first + 1) * abs(int(self.sides[first]))

    def _stretches(self) -> list[tuple[int, int]]:
        """Windows next to each other that are of one side, as (first, last)."""
        sides = self.sides
        starts = [w for w in range(len(sides)) if w == 0 or sides[w] != sides[w - 1]]
        ends = [w for w in range(len(sides)) if w == len(sides) - 1 or sides[w] != sides[w + 1]]
        return list(zip(starts, ends, strict=True))

    @property
    def is_outside(self) -> bool:
        return self.bad_step is not None or self.outside() is not None


def compare(run: Curve, reference: Curve, window: int | None = WINDOW, in_a_row: int = IN_A_ROW) -> Comparison:
    """Lay a run's curve beside a reference, as far as both go.

    Args:
        run: losses (S,).
        reference: losses (R, S') of R >= 2 seeds, all positive.
        window: steps; None = each logged step is a window, and only steps of the reference are compared (validation).
        in_a_row: windows in a row that must be outside for the curve to be.
    """
    bad = np.flatnonzero(~(np.isfinite(run.losses) & (run.losses > 0)))
    bad_step, bad_loss = (int(run.steps[bad[0]]), float(run.losses[bad[0]])) if len(bad) else (None, None)
    run = run.at(np.arange(len(run.steps)) < (bad[0] if len(bad) else len(run.steps)))
    known = (run.steps >= reference.steps[0]) & (run.steps <= reference.steps[-1])
    if window is None:
        known &= np.isin(run.steps, reference.steps)
    run = run.at(known)

    logs = np.log(reference.losses)
    centre = logs.mean(0)
    own = windows_of(run.steps, reference.steps, window)
    theirs = windows_of(reference.steps, reference.steps, window)
    spread, freedom = pooled_spread(logs - centre, theirs)  # by window

    present, first, inverse, rows = np.unique(own, return_index=True, return_inverse=True, return_counts=True)
    at_run = np.interp(run.steps, reference.steps, centre)
    middle = np.bincount(inverse, at_run, len(present)) / rows
    value = np.bincount(inverse, np.log(run.losses), len(present)) / rows
    reference_rows = np.bincount(theirs)[present] if len(present) else rows
    s = np.maximum(spread[present], FLOOR) * np.sqrt(np.maximum(reference_rows / rows, 1))
    half = student_t.ppf((1 + CONFIDENCE) / 2, freedom[present]) * np.sqrt(1 + 1 / len(logs)) * s
    return Comparison(
        steps=np.stack([run.steps[first], run.steps[first + rows - 1]], axis=1),
        values=np.exp(value),
        low=np.exp(middle - half),
        high=np.exp(middle + half),
        in_a_row=in_a_row,
        bad_step=bad_step,
        bad_loss=bad_loss,
    )


def windows_of(steps: np.ndarray, reference_steps: np.ndarray, window: int | None) -> np.ndarray:
    """(S,) the number of each step's window: steps 1 to `window` are in window 0."""
    return np.searchsorted(reference_steps, steps) if window is None else (steps - 1) // window


def pooled_spread(deviations: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s and f of the module's formula, by window, from deviations of the logs from their mean (R, S).

    A window without rows takes what its neighbours have.
    """
    seeds, number = len(deviations), int(windows.max()) + 1
    rows = np.bincount(windows, minlength=number)
    sums = np.stack([np.bincount(windows, d, number) for d in deviations])  # (R, W)
    squares = ((sums / np.maximum(rows, 1)) ** 2).sum(0)
    neighbours = np.ones(2 * NEAR + 1)
    pooled = np.convolve(squares, neighbours)[NEAR : NEAR + number]
    freedom = np.convolve((rows > 0).astype(float), neighbours)[NEAR : NEAR + number] * (seeds - 1)
    return np.sqrt(pooled / np.maximum(freedom, 1)), np.maximum(freedom, 1)
