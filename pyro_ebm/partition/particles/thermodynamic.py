r"""Thermodynamic integration: the curve behind :math:`\log Z`.

Along the geometric path :math:`f_\beta = (1 - \beta) f_0 + \beta f` from a normalised
base,

.. math::
    \log Z = -\int_0^1 u(\beta)\, d\beta, \qquad
    u(\beta) = \mathbb{E}_\beta[f - f_0]                                     \tag{1}

and :math:`-u` never falls, since its slope is a variance. Where the curve is steep the
target differs the most from what is hotter; a kink is a phase transition. The
populations of one run of sequential Monte Carlo give it at every temperature, for no
further evaluation of the energy; its trapezoidal sum is corrected at the ends by the
slopes,

.. math::
    -\log \hat Z &= \sum_k \tfrac{h_k}{2} (u_k + u_{k+1})
        + \tfrac{h_k^2}{12} (v_{k+1} - v_k)                                   \\
    v_k &= \mathrm{Var}_{\beta_k}[f - f_0]                            \tag{2}

References:
    Gelman & Meng (1998), Statistical Science 13, 163-185.
    Friel, Hurn & Wyse (2014), Statistics and Computing 24, 709-723 (the correction).
"""

__all__ = ["ThermodynamicCurve", "thermodynamic_integration"]

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.diagnostics import log_mean_exp
from pyro_ebm.energies import Energy
from pyro_ebm.partition.base import combine_replicates
from pyro_ebm.partition.particles.smc import run_smc
from pyro_ebm.partition.progress import watched


class ThermodynamicCurve(NamedTuple):
    r"""The integrand of (1) with its errors.

    Attributes:
        inverse_temperatures: :math:`\beta_k` from 0 to 1, shape ``(K,)``.
        mean: :math:`u(\beta_k)` in nats, shape ``(K,)``.
        std_error: Standard error of ``mean`` over the islands, shape ``(K,)``.
        log_partition: The integral (2).
        log_partition_std_error: Over the islands and from the spacing.
        num_evaluations: Energy evaluations spent, a point each.
        log_partitions: The integral up to each temperature, :math:`\log Z` of the
            tempered energy, shape ``(K,)``.
        log_partitions_std_error: Over the islands and, by the size of the correction
            in (2), from the spacing, shape ``(K,)``. Cautious where the temperatures
            are few.

    Example:
        It is what :func:`thermodynamic_integration` returns.

        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
        >>> curve = thermodynamic_integration(energy, base)
        >>> bool((curve.mean.diff() < 3 * curve.std_error[1:]).all())  # it falls
        True
    """

    inverse_temperatures: Tensor
    mean: Tensor
    std_error: Tensor
    log_partition: float
    log_partition_std_error: float
    num_evaluations: int
    log_partitions: Tensor
    log_partitions_std_error: Tensor


def thermodynamic_integration(
    energy: Energy,
    base: dist.TorchDistribution,
    *,
    num_islands: int = 4,
    num_particles: int = 256,
    ess_threshold: float = 0.9,
    progress_bar: bool = True,
) -> ThermodynamicCurve:
    r"""Follow the mean energy from a base to a target; a check to look at.

    For :math:`\log Z` itself :func:`~pyro_ebm.partition.estimate` is the better choice.

    Args:
        energy: On a finite support, or any that ``biject_to`` knows.
        base: A normalised distribution on the same event and support, wider than the
            target.
        num_islands: Independent populations, at least 2, for the errors.
        num_particles: Particles an island, a multiple of 16.
        ess_threshold: Effective fraction of the weights at which the next temperature
            is placed. Nearer to 1 the temperatures are more, and the error from their
            spacing smaller: on three separate modes it was 0.8 nats at 0.5, and below
            the error over the islands at 0.9, for 2.7 times the evaluations.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Raises:
        DivergenceError: If the energy is finite at no draw of the base.
        ValueError: If a count is out of range or the base does not fit the energy.

    Exactness: *consistent*, up to the spacing of the temperatures.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.ones(2))
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> curve = thermodynamic_integration(energy, base)
        >>> abs(curve.log_partition - 1.838) < 0.3
        True
    """
    if not 0 < ess_threshold < 1:
        raise ValueError(f"ess_threshold must be between 0 and 1, got {ess_threshold}.")
    with watched(energy, is_shown=progress_bar) as target:
        islands = run_smc(
            target,
            base,
            num_islands=num_islands,
            num_particles=num_particles,
            ess_threshold=ess_threshold,
        )
    betas = torch.tensor(islands.inverse_temperatures).to(islands.curve)
    steps = betas.diff()[:, None]
    u, v = islands.curve, islands.curve_variance
    correction = steps**2 / 12 * v.diff(dim=0)
    trapezoids = steps / 2 * (u[:-1] + u[1:]) + correction
    path = torch.cat([torch.zeros_like(u[:1]), -trapezoids.cumsum(0)])  # (2)
    path = path + islands.log_start
    spacing = torch.nn.functional.pad(correction.mean(-1).cumsum(0), (1, 0))
    path_error = torch.hypot(path.std(-1) / math.sqrt(num_islands), spacing)
    return ThermodynamicCurve(
        betas,
        u.mean(-1),
        u.std(-1) / math.sqrt(num_islands),
        combine_replicates(path[-1])[0],
        path_error[-1].item(),
        islands.num_evaluations,
        log_mean_exp(path),
        path_error,
    )
