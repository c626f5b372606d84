r"""Exact :math:`\log Z` over a finite support, by summing over all of its points.

.. math::
    \log Z = \log \sum_{x \in \mathcal{X}} e^{-f(x)}                  \tag{1}

Of a restricted Boltzmann machine the sum runs over the smaller of its layers; the other
is summed out in closed form.
"""

__all__ = ["enumeration", "num_states"]

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.core.verdict import Finding, Reason, Status, status_of
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.energies.discrete.rbm import RBMEnergy
from pyro_ebm.energies.views.double import in_double
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.exact.budget import Budget, OutOfBudgetError
from pyro_ebm.partition.exact.precision import insists_on_single
from pyro_ebm.partition.progress import bar_settings

#: States whose numbers are held at once; and those after which it is known how long the
#: others will take.
_CHUNK, _FIRST = 2**18, 2**14


@torch.no_grad()
def enumeration(
    energy: Energy,
    *,
    max_states: int = 2**22,
    max_seconds: float = 300.0,
    max_bytes: float = 2**30,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Sum ``e^-f`` over a finite support.

    Args:
        energy: Over booleans, integers of an interval or spins, independent or not.
            Its points come in as floating-point numbers.
        max_states: Largest number of points that is worth the time.
        max_seconds: Seconds after which the sum is given up; or as soon as it is clear
            that it would take more than twice as many.
        max_bytes: By how much the memory of the process may grow: how many points are
            given to the energy at once.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; ``"unreliable"`` if an energy is ``nan`` or ``-inf``, all are
        infinite, or the time is up.

    Raises:
        ValueError: If the support is not finite or has too many points.

    Exactness: *exact* up to the rounding of the energies, which is the standard error.
    They are computed in double precision where they can be, and summed in it. What is
    given up is a lower bound.

    Example:
        >>> energy = pyro_ebm.energies.IsingEnergy((3, 3), 0.3, periodic=False)
        >>> print(enumeration(energy).status, round(enumeration(energy).value, 4))
        exact 6.8015
    """
    energy = _smaller_layer(energy)
    total = _states_to_sum(energy, max_states)
    if energy.tensor_options()["dtype"] != torch.float64:
        energy = in_double(energy)
    with tqdm(
        total=total, desc="log Z", unit="", unit_scale=True,
        **bar_settings(is_shown=progress_bar),
    ) as bar:  # fmt: skip
        budget = Budget(total, max_seconds, max_bytes, bar)
        sums = _Sums(energy, total, budget)
        why = sums.run()
    return sums.result(why)


class _Sums:
    """Sums over states in double precision."""

    def __init__(self, energy: Energy, total: int, budget: Budget) -> None:
        self.energy, self.total, self.budget = energy, total, budget
        self.like = torch.empty(0, **energy.tensor_options())
        device = self.like.device
        nothing = torch.full((), -torch.inf, dtype=torch.float64, device=device)
        self.log_sum, self.log_size = nothing, nothing  # of e^-f, and of |f| e^-f

    def run(self) -> Finding | None:
        """Add up all states; what speaks against the sum."""
        is_number, stop = True, 0
        while stop < self.total:
            start, chunk = stop, _CHUNK if stop else min(_FIRST, _CHUNK)
            stop = min(start + chunk, self.total)
            number = torch.arange(start, stop, device=self.log_sum.device)
            try:
                (value,) = self.budget.evaluate(self._energies, number)
                self.budget.require_time(self.total)
            except OutOfBudgetError as error:
                share = self.budget.num_evaluations / self.total
                text = f"{error}: {share:.1%} of the states were summed"
                return Finding(Reason.OUT_OF_BUDGET, text)
            value = value.double()
            is_number &= bool((value > -torch.inf).all())
            self.log_sum = torch.logaddexp(self.log_sum, (-value).logsumexp(0))
            size = value.abs().log() - value
            size = size.nan_to_num(-torch.inf, torch.inf, -torch.inf).logsumexp(0)
            self.log_size = torch.logaddexp(self.log_size, size)
        if self.log_sum == -torch.inf:
            return Finding(Reason.NOT_FINITE, "the energy is infinite at all states")
        if not is_number:
            text = "the energy is nan or -inf at some states"
            return Finding(Reason.NOT_FINITE, text)
        return None

    def _energies(self, number: Tensor) -> tuple[Tensor]:
        energy = self.energy
        x = finite_points(energy.support, energy.event_shape, number, self.like)
        return (energy(x),)

    def result(self, why: Finding | None) -> LogPartitionEstimate:
        """The estimate; its error is the rounding of an energy of the usual size."""
        value = self.log_sum.item()
        is_single = insists_on_single(self.energy)
        eps = torch.finfo(torch.float32 if is_single else torch.float64).eps
        error = eps * (self.log_size - self.log_sum).exp().item()
        error = error if math.isfinite(error) else 0.0
        reasons = () if why is None else (why,)
        return LogPartitionEstimate(
            value,
            error,
            value - 2 * error,
            value + 2 * error,
            math.nan,
            status_of(reasons, Status.EXACT),
            "enumeration",
            self.budget.num_evaluations,
            reasons,
            self.budget.seconds,
        )


def _states_to_sum(energy: Energy, max_states: int) -> int:
    """How many points there are, if they are not too many."""
    total = num_states(energy)
    if total is None:
        raise ValueError(
            f"energy must have a finite support to be enumerated, got "
            f"{energy.support}. independent(boolean, n), "
            "independent(integer_interval(a, b), n) and independent(spins, n) are "
            "finite; elsewhere use pyro_ebm.partition.estimate."
        )
    if total > max_states:
        raise ValueError(
            f"energy has 2^{math.log2(total):.3g} states to enumerate, more than "
            f"max_states = {max_states:,}. Use pyro_ebm.partition.gibbs_annealing, or "
            "raise max_states."
        )
    return total


def num_states(energy: Energy) -> int | None:
    """How many points :func:`enumeration` sums over, ``None`` if infinitely many."""
    energy = _smaller_layer(energy)
    return num_points(energy.support, energy.event_shape)


def _smaller_layer(energy: Energy) -> Energy:
    if not isinstance(energy, RBMEnergy):
        return energy
    over_hidden = energy.over_hidden()
    count = num_points(energy.support, energy.event_shape)
    if count is None or count > 2 ** len(energy.hidden_bias):
        return over_hidden
    return energy
