r"""Streaming means and variances, with errors, for chains whose draws are not kept.

Of each chain the mean and the sum of squares of consecutive *batches* are kept. When
there is no more room neighbours become one, so that a few batches always stand for the
whole run. With :math:`\bar x_{cj}` the mean of batch ``j`` of chain ``c``, of ``B``
batches and ``C`` chains,

.. math::
    \mathrm{se}(\bar x)^2 = \frac{\mathrm{Var}_{cj}\, \bar x_{cj}}{C B}, \qquad
    \mathrm{ESS} = \frac{\mathrm{Var}\, x}{\mathrm{se}(\bar x)^2}           \tag{1}

once a batch is long beside the autocorrelation; and the same of
:math:`(x - \bar x)^2`.

References:
    Flegal & Jones (2010), Annals of Statistics 38(2), 1034-1070. Chan, Golub & LeVeque
    (1983), The American Statistician 37(3), 242-247.
"""

__all__ = ["BatchMoments"]

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.diagnostics import Convergence
from pyro_ebm.diagnostics.convergence import nested_ratio_of_moments, ratio_of_moments
from pyro_ebm.mcmc.base import ChainState, StepInfo

#: Draws that wait to be constrained together; the length of the first batches.
_PENDING = 8
#: Batches wanted of all chains together.
_WANTED_BATCHES = 512


class _Part(NamedTuple):
    """Some draws of each chain: their number, mean and sum of squared deviations."""

    length: int
    mean: Tensor
    squares: Tensor

    def merged(self, other: "_Part") -> "_Part":
        """Both together."""
        length = self.length + other.length
        if not other.length:
            return self
        step = other.mean - self.mean
        between = step**2 * (self.length * other.length / length)
        mean = self.mean + step * (other.length / length)
        return _Part(length, mean, self.squares + other.squares + between)


class BatchMoments:
    """Batch means of all chains, kept instead of their draws.

    Args:
        state: Of the chains, for shapes.
        flatten: From points ``(N, C, *event)`` to the numbers ``(N, C, D)`` whose
            moments are wanted.
    """

    def __init__(self, state: ChainState, flatten: Callable[[Tensor], Tensor]) -> None:
        self._flatten = flatten
        self._u = state.x.new_empty((_PENDING, *state.x.shape))
        self._energy = state.energy.new_empty((_PENDING, *state.energy.shape))
        zeros = torch.zeros_like(self._columns(state.x[None], state.energy[None])[0])
        self._open = _Part(0, zeros, zeros)
        share = math.ceil(math.log2(_WANTED_BATCHES / len(zeros)))
        shape = (2 ** min(max(share, 2), 6), *zeros.shape)
        self._means, self._squares = zeros.new_zeros(shape), zeros.new_zeros(shape)
        self._batch_size, self._num_batches = _PENDING, 0
        self.num_draws = 0

    def reserve(self, num_draws: int) -> None:
        """Nothing to do, however many draws there will be."""

    def add(self, state: ChainState, info: StepInfo) -> None:
        """Take the points of all chains into account."""
        index = self.num_draws % _PENDING
        self._u[index].copy_(state.x)
        self._energy[index].copy_(state.energy)
        self.num_draws += 1
        if index == _PENDING - 1:
            self._open = self._open.merged(self._waiting(_PENDING))
            if self._open.length == self._batch_size:
                self._close()

    def _columns(self, u: Tensor, energy: Tensor) -> Tensor:
        """What moments are taken of: the wanted numbers and, last, the energy."""
        return torch.cat([self._flatten(u).double(), energy.double()[..., None]], -1)

    def _waiting(self, count: int) -> _Part:
        columns = self._columns(self._u[:count], self._energy[:count])
        variance, mean = torch.var_mean(columns, 0, correction=0)
        return _Part(count, mean, variance * count)

    def _close(self) -> None:
        """Keep the open batch, and make room where there is no more."""
        self._means[self._num_batches] = self._open.mean
        self._squares[self._num_batches] = self._open.squares
        zeros = torch.zeros_like(self._open.mean)
        self._open = _Part(0, zeros, zeros)
        self._num_batches += 1
        if self._num_batches == len(self._means):
            first, second = (
                _Part(self._batch_size, self._means[i::2], self._squares[i::2])
                for i in (0, 1)
            )
            both = first.merged(second)
            self._batch_size, self._num_batches = both.length, len(both.mean)
            self._means[: len(both.mean)] = both.mean
            self._squares[: len(both.mean)] = both.squares

    def _chains(self, batches: slice) -> _Part:
        """Some of the closed batches of each chain, as one."""
        means, squares = self._means[batches], self._squares[batches]
        mean = means.mean(0)
        between = self._batch_size * ((means - mean) ** 2).sum(0)
        return _Part(len(means) * self._batch_size, mean, squares.sum(0) + between)

    def _total(self) -> _Part:
        """All draws of each chain."""
        total = self._open
        if self._num_batches:
            total = self._chains(slice(self._num_batches)).merged(total)
        count = self.num_draws % _PENDING
        return total.merged(self._waiting(count)) if count else total

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Of all draws, shape ``(D,)`` each."""
        mean, variance = self._pooled()
        return mean[:-1], variance[:-1]

    def _pooled(self) -> tuple[Tensor, Tensor]:
        length, mean, squares = self._total()
        overall = mean.mean(0)
        squares = (squares + length * (mean - overall) ** 2).sum(0)
        return overall, squares / max(length * len(mean) - 1, 1)

    def energy_variance(self) -> Tensor:
        """Variance of the energy along each chain, shape ``(C,)``."""
        total = self._total()
        return total.squares[:, -1] / max(total.length - 1, 1)

    def energy_mean(self) -> Tensor:
        """Mean of the energy along each chain, shape ``(C,)``."""
        return self._total().mean[:, -1]

    def convergence(self, num_superchains: int) -> Convergence:
        """What batches tell, shape ``(D,)`` each.

        R-hat is that of the draws, not of ranks; ``bulk_ess`` is the sample size of the
        mean, and there is no ``tail_ess``. All are ``nan`` before two batches are full.
        """
        mean, variance = self._pooled()
        halves = self._num_batches // 2
        if not halves:
            nothing = torch.full_like(mean[:-1], torch.nan)
            return Convergence(*[nothing] * len(Convergence._fields))
        means = self._means[: self._num_batches]
        squares = self._squares[: self._num_batches] / self._batch_size
        error = _error(means)
        sd_error = _error(squares + (means - mean) ** 2) / (2 * variance.sqrt())
        found = Convergence(
            *self._r_hats(halves, num_superchains),
            bulk_ess=variance / error**2,
            tail_ess=torch.full_like(mean, torch.nan),
            mean_std_error=error,
            sd_std_error=sd_error,
        )
        return Convergence(*(value[:-1] for value in found))

    def _r_hats(self, num_batches: int, num_superchains: int) -> tuple[Tensor, Tensor]:
        """Plain and nested, of the first and the last batches of each chain."""
        last = slice(self._num_batches - num_batches, self._num_batches)
        parts = [self._chains(slice(num_batches)), self._chains(last)]
        mean = torch.cat([part.mean for part in parts]).mT
        variance = torch.cat([part.squares for part in parts]).mT / (
            parts[0].length - 1
        )
        return (
            ratio_of_moments(mean, variance, parts[0].length),
            nested_ratio_of_moments(mean, variance, 2 * num_superchains),
        )

    def r_hat(self) -> float:
        """The largest R-hat so far, for a progress bar."""
        r_hat = self.convergence(self._means.shape[1]).r_hat
        return r_hat.nan_to_num(0.0).amax().item()

    def state_dict(self) -> dict[str, Any]:
        """Copies of all there is."""
        state = {k: v for k, v in vars(self).items() if k not in ("_flatten", "_open")}
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        return {**state, "open": tuple(self._open)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        device = self._u.device
        for name, value in state.items():
            if name != "open":
                value = value.to(device) if isinstance(value, Tensor) else value
                setattr(self, name, value)
        length, mean, squares = state["open"]
        self._open = _Part(length, mean.to(device), squares.to(device))


def _error(means: Tensor) -> Tensor:
    """Standard error of the mean of batches, ``(B, C, D)`` to ``(D,)``."""
    flat = means.flatten(0, 1)
    return flat.std(0) / math.sqrt(len(flat))  # (1)
