r"""Rows with missing entries: candidates for them, weighted by the model.

The missing part :math:`x_m` of a row is drawn many times from the base's conditional,
once; of these a draw of the model's conditional is one that is chosen by the weights

.. math::
    w \propto \frac{e^{-f(x_o, x_m)}}{p(x_o, x_m)}                          \tag{1}

so that the gradient of the likelihood of what was seen is, with log Z as ever,
:math:`-\mathbb{E}_{q(x_m \mid x_o)}[\nabla f]`. Entries are taken to be missing at
random, given what was seen of their rows.

References:
    Little & Rubin (2019), Statistical Analysis with Missing Data, 3rd ed.
"""

__all__ = ["Candidates", "Imputed", "imputed"]

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.bases.conditional import as_mixture, conditional_draws
from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.energies import Energy

#: Candidates of a row, and numbers that all of them may take; evaluated at once.
_NUMBER, _MOST, _CHUNK = 64, 20_000_000, 100_000


class Imputed(NamedTuple):
    """Rows whose missing entries have been drawn.

    Attributes:
        draws: Shape ``(num_samples, N, D)``; what was seen is as it was.
        mean: Mean of the missing entries given the others, from all candidates; shape
            ``(N, D)``.
        effective: Effective number of the candidates of each row, shape ``(N,)``.

    Example:
        >>> Imputed(torch.zeros(1, 1, 2), torch.zeros(1, 2), torch.tensor([200.0]))[2]
        tensor([200.])
    """

    draws: Tensor
    mean: Tensor
    effective: Tensor


class Candidates:
    """Draws of the missing entries of rows, to be chosen from by (1).

    Args:
        base: What they are drawn from, see
            :func:`~pyro_ebm.bases.conditional.as_mixture`.
        energy: What is learned.
        rows: Shape ``(N, D)``.
        missing: Which entries are, shape ``(N, D)``.
        number: Of candidates of a row; default: 64, fewer where memory says so.
    """

    def __init__(
        self,
        base: Any,
        energy: Energy,
        rows: Tensor,
        missing: Tensor,
        number: int | None = None,
    ) -> None:
        mixture = as_mixture(base)
        self.of_row = missing.any(1).long().cumsum(0) - 1  # where a row's are
        self.missing = missing
        count = int(self.of_row[-1]) + 1
        if number is None:
            number = max(8, min(_NUMBER, _MOST // max(1, count * rows.shape[1])))
        gone = missing.any(1)
        self.x = conditional_draws(mixture, rows[gone], missing[gone], number)
        # What does not change while the energy is learned.
        known = _values(energy, self.x) - _values(energy.correction, self.x)
        self.known = known + _values(mixture.log_prob, self.x)
        self.weigh(energy)

    @torch.no_grad()
    def weigh(self, energy: Energy) -> None:
        """Weights (1) of the energy as it is now."""
        self.log_weights = -_values(energy.correction, self.x) - self.known

    def choose(self, index: Tensor) -> Tensor:
        """A candidate for each row of some that lack entries, shape ``(n, D)``."""
        where = self.of_row[index]
        log_weights = self.log_weights[:, where]
        chosen = torch.multinomial(log_weights.softmax(0).mT, 1)[:, 0]
        return self.x[chosen, where]

    def fill(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows at ``index`` with their missing entries drawn, shape ``(n, D)``."""
        gone = self.missing[index].any(1)
        if not gone.any():
            return rows
        rows = rows.clone()
        rows[gone] = self.choose(index[gone])
        return rows


@torch.no_grad()
def imputed(
    base: Any, energy: Energy, x: Tensor, num_samples: int, num_candidates: int
) -> Imputed:
    """Draws of the missing entries of rows by (1), see :meth:`FitResult.impute`.

    Args:
        base: What the candidates are drawn from.
        energy: Of the model.
        x: Shape ``(N, D)``, with ``nan`` where an entry is missing.
        num_samples: Draws of each row.
        num_candidates: Of each row.
    """
    missing = x.isnan()
    draws, mean = x.expand(num_samples, *x.shape).clone(), x.clone()
    effective = torch.full_like(x[:, 0], float(num_candidates))
    gone = missing.any(1)
    if gone.any():
        found = Candidates(base, energy, x, missing, num_candidates)
        weights = found.log_weights.softmax(0)
        chosen = torch.multinomial(weights.mT, num_samples, replacement=True).mT
        draws[:, gone] = found.x[chosen, torch.arange(chosen.shape[1])]
        means = (weights[..., None] * found.x).sum(0)
        mean[gone] = means.where(missing[gone], x[gone])
        fraction = effective_sample_fraction(found.log_weights.mT)
        effective[gone] = num_candidates * fraction.to(effective)
    return Imputed(draws, mean, effective)


@torch.no_grad()
def _values(fn: Any, x: Tensor) -> Tensor:
    """``fn`` at points ``(number, n, D)``, in pieces; shape ``(number, n)``."""
    parts = x.flatten(0, 1).split(max(1, _CHUNK // x.shape[-1]))
    return torch.cat([fn(part) for part in parts]).reshape(x.shape[:-1])
