r"""Targets over finite supports whose :math:`\log Z` is known.

Each function returns a :class:`~pyro_ebm.testing.targets.Target`. The truth is computed
from the constants that the energy is built with: by Kaufman's formula for the Ising
torus, by a transfer matrix for the Potts torus, by summing over the hidden units of a
restricted Boltzmann machine.

References:
    Kaufman (1949), Physical Review 76, 1232-1243.
    Kramers & Wannier (1941), Physical Review 60, 252-262 (the transfer matrix).
"""

__all__ = ["ising", "kaufman", "potts", "rbm", "transfer_matrix"]

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.energies import IsingEnergy, PottsEnergy, RBMEnergy
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.testing.targets import Target

#: Inverse temperatures at which infinite square lattices of unit coupling are critical.
ISING_CRITICAL = math.log(1 + math.sqrt(2)) / 2
POTTS_CRITICAL = math.log(1 + math.sqrt(3))


def ising(side: int = 8, coupling: float = ISING_CRITICAL) -> Target:
    """The Ising torus of ``side`` by ``side`` spins, ``coupling > 0``, no field.

    Example:
        >>> target = ising(side=3, coupling=0.3)
        >>> found = pyro_ebm.partition.enumeration(target.energy)
        >>> abs(found.value - target.log_partition) < 1e-4
        True
    """
    energy = IsingEnergy((side, side), coupling)
    return Target(
        "ising",
        energy,
        kaufman(side, side, coupling),
        IndependentSites.uniform(energy.support, energy.event_shape),
        mean=torch.zeros(side, side),
        variance=torch.ones(side, side),
    )


def potts(
    side: int = 6, num_categories: int = 3, coupling: float = POTTS_CRITICAL
) -> Target:
    """The Potts torus of ``side`` by ``side`` categories.

    The transfer matrix has ``num_categories**side`` rows.

    Example:
        >>> potts(side=3).mean[0]
        tensor([1., 1., 1.])
    """
    energy = PottsEnergy((side, side), num_categories, coupling)
    return Target(
        "potts",
        energy,
        transfer_matrix(side, side, coupling * torch.eye(num_categories).double()),
        IndependentSites.uniform(energy.support, energy.event_shape),
        mean=torch.full((side, side), (num_categories - 1) / 2),
        variance=torch.full((side, side), (num_categories**2 - 1) / 12),
    )


def rbm(num_visible: int = 60, num_hidden: int = 16, scale: float = 0.5) -> Target:
    """A machine with normal weights of the given scale and biases of scale 0.5.

    The constants are the same at every call. At the default size and scale annealing
    from the visible biases errs four times as much as from the mean field.

    Example:
        >>> target = rbm(num_visible=8, num_hidden=4)
        >>> found = pyro_ebm.partition.enumeration(target.energy)
        >>> abs(found.value - target.log_partition) < 1e-4
        True
    """
    generator = torch.Generator().manual_seed(0)
    size = num_visible * num_hidden + num_visible + num_hidden
    # Other dtypes would draw other numbers.
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    weight, biases = normal.to(torch.empty(0)).split(
        [num_visible * num_hidden, num_visible + num_hidden]
    )
    weight = scale * weight.reshape(num_visible, num_hidden)
    visible_bias, hidden_bias = (biases / 2).split([num_visible, num_hidden])
    number = torch.arange(2**num_hidden)[:, None]
    hidden = (number >> torch.arange(num_hidden) & 1).to(weight)
    logits = visible_bias + hidden @ weight.mT
    log_weights = hidden @ hidden_bias + softplus(logits).sum(-1)
    mean = log_weights.softmax(0) @ logits.sigmoid()

    def sample(shape: Sequence[int]) -> Tensor:
        chosen = dist.Categorical(logits=log_weights).sample(torch.Size(shape))
        return torch.bernoulli(logits[chosen].sigmoid())

    return Target(
        "rbm",
        RBMEnergy(weight, visible_bias, hidden_bias),
        torch.logsumexp(log_weights, 0).item(),
        dist.Bernoulli(torch.full((num_visible,), 0.5)).to_event(1),
        sample,
        mean,
        mean * (1 - mean),
    )


def kaufman(rows: int, columns: int, coupling: float) -> float:
    r""":math:`\log Z` of the Ising torus with ``coupling > 0``, by Kaufman's formula.

    .. math::
        \cosh\gamma_l &= \frac{\cosh^2 2J}{\sinh 2J} - \cos\frac{l\pi}{n}, \qquad
        \gamma_0 = 2J + \log\tanh J                                            \\
        Z &= \tfrac12 (2 \sinh 2J)^{mn/2} \Big[
            \prod_{k} 2\cosh\tfrac m2\gamma_{2k+1}
            + \prod_{k} 2\sinh\tfrac m2\gamma_{2k+1}                           \\
            &\qquad + \prod_{k} 2\cosh\tfrac m2\gamma_{2k}
            + \prod_{k} 2\sinh\tfrac m2\gamma_{2k}\Big]

    for :math:`m` rows and :math:`n` columns, :math:`k = 0, \dots, n - 1`.

    Exactness: *exact*.

    Example:
        >>> round(kaufman(4, 4, 0.3), 4)
        12.7855
    """
    index = torch.arange(2 * columns, dtype=torch.float64)
    base = math.cosh(2 * coupling) ** 2 / math.sinh(2 * coupling)
    gamma = torch.acosh((base - (index * math.pi / columns).cos()).clamp(min=1))
    gamma[0] = 2 * coupling + math.log(math.tanh(coupling))
    half = rows / 2 * gamma
    log_cosh = half.abs() + (-2 * half.abs()).exp().log1p()
    log_sinh = half.abs() + (-(-2 * half.abs()).exp()).log1p()
    terms = torch.stack(
        [part[first::2].sum() for part in (log_cosh, log_sinh) for first in (1, 0)]
    )
    signs = torch.tensor([1.0, 1.0, 1.0, torch.sign(gamma[0])], dtype=torch.float64)
    log_sum = terms.max() + (signs * (terms - terms.max()).exp()).sum().log()
    log_front = rows * columns / 2 * math.log(2 * math.sinh(2 * coupling))
    return log_front - math.log(2) + log_sum.item()


def transfer_matrix(rows: int, columns: int, bond: Tensor) -> float:
    r""":math:`\log Z` of a torus, as the trace of a matrix power.

    Args:
        rows: Sites along the direction of the power.
        columns: Sites of a row; the matrix has ``q**columns`` rows.
        bond: Minus the energy of a bond between two values, symmetric, shape
            ``(q, q)``.

    Exactness: *exact*.

    Example:
        >>> spin = torch.tensor([-1.0, 1.0])
        >>> round(transfer_matrix(4, 4, 0.3 * spin * spin[:, None]), 4)
        12.7855
    """
    bond = bond.double()
    number = torch.arange(len(bond) ** columns)[:, None]
    row = number // len(bond) ** torch.arange(columns) % len(bond)
    inside = bond[row, row.roll(1, -1)].sum(-1)
    across = sum(bond[site[:, None], site] for site in row.unbind(-1))
    log_matrix = across + (inside + inside[:, None]) / 2
    top = log_matrix.max()
    eigenvalues = torch.linalg.eigvalsh((log_matrix - top).exp())
    # The largest is positive; negative ones count with the sign of the power.
    return rows * top.item() + eigenvalues.pow(rows).sum().log().item()
