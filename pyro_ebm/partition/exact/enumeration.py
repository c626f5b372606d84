r"""Exact :math:`\log Z` over a finite support, by summing over all of its points.

.. math::
    \log Z = \log \sum_{x \in V^D} e^{-f(x)}                               \tag{1}

Of a restricted Boltzmann machine the sum runs over the smaller of its layers; the other
is summed out in closed form.
"""

__all__ = ["enumeration", "num_states"]

import math

import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, Status, status_of
from pyro_ebm.energies import Energy
from pyro_ebm.energies.finite import finite_values
from pyro_ebm.energies.rbm import RBMEnergy
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.progress import watched

#: Numbers given to the energy at once.
_CHUNK = 2**20


@torch.no_grad()
def enumeration(
    energy: Energy, *, max_states: int = 2**22, progress_bar: bool = True
) -> LogPartitionEstimate:
    r"""Sum ``e^-f`` over a finite support.

    Args:
        energy: Over booleans, integers of an interval or spins, independent or not.
            Its points come in as floating-point numbers.
        max_states: Largest number of points that is worth the time.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; ``"unreliable"`` if an energy is ``nan`` or ``-inf``, or all are
        infinite.

    Raises:
        ValueError: If the support is not finite or has too many points.

    Exactness: *exact*, up to the rounding of the energies; the sum is in double
    precision.

    Example:
        >>> energy = pyro_ebm.energies.IsingEnergy((3, 3), 0.3, periodic=False)
        >>> print(enumeration(energy).status, round(enumeration(energy).value, 4))
        exact 6.8015
    """
    energy = _smaller_layer(energy)
    values, total = _states_to_sum(energy, max_states)
    chunk = max(1, _CHUNK // max(1, energy.event_shape.numel()))
    log_sum, why = torch.tensor(-torch.inf, dtype=torch.float64), ""
    with watched(energy, total, is_shown=progress_bar) as target:
        for start in range(0, total, chunk):
            x = _states(target, values, start, min(start + chunk, total))
            log_density = -target(x).double()
            if not (log_density < torch.inf).all():
                why = "the energy is nan or -inf at some states"
            log_sum = torch.logaddexp(log_sum.to(x.device), log_density.logsumexp(0))
    value = log_sum.item()
    if value == -math.inf:
        why = "the energy is infinite at all states"
    reasons = (Finding(Reason.NOT_FINITE, why),) if why else ()
    return LogPartitionEstimate(
        value,
        0.0,
        value,
        value,
        math.nan,
        status_of(reasons, Status.EXACT),
        "enumeration",
        total,
        reasons,
    )


def _states_to_sum(energy: Energy, max_states: int) -> tuple[tuple[float, ...], int]:
    """What a coordinate can be, and how many points that makes."""
    total, values = num_states(energy), finite_values(energy.support)
    if total is None or values is None:
        raise ValueError(
            f"energy must have a finite support to be enumerated, got "
            f"{energy.support}. independent(boolean, n), "
            "independent(integer_interval(a, b), n) and independent(spins, n) are "
            "finite; elsewhere use pyro_ebm.partition.estimate."
        )
    if total > max_states:
        raise ValueError(
            f"energy has {len(values)}^{energy.event_shape.numel()} states to "
            f"enumerate, more than max_states = {max_states:,}. Use "
            "pyro_ebm.partition.gibbs_annealing, or raise max_states."
        )
    return values, total


def num_states(energy: Energy) -> int | None:
    """How many points :func:`enumeration` sums over, ``None`` if infinitely many."""
    energy = _smaller_layer(energy)
    values = finite_values(energy.support)
    return None if values is None else len(values) ** energy.event_shape.numel()


def _smaller_layer(energy: Energy) -> Energy:
    if isinstance(energy, RBMEnergy):
        num_visible, num_hidden = energy.weight.shape
        return energy.transposed() if num_hidden < num_visible else energy
    return energy


def _states(energy: Energy, values: tuple[float, ...], start: int, stop: int) -> Tensor:
    """Points number ``start`` to ``stop``, shape ``(stop - start, *event)``."""
    options = energy.tensor_options()
    sites = torch.arange(energy.event_shape.numel(), device=options["device"])
    number = torch.arange(start, stop, device=options["device"])
    digits = number[:, None] // len(values) ** sites % len(values)
    x = torch.tensor(values, **options)[digits]
    return x.reshape(-1, *energy.event_shape)
