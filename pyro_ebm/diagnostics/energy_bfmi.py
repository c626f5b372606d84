r"""Energy Bayesian fraction of missing information (E-BFMI).

A chain that draws :math:`r \sim \mathcal N(0, I_D)` at each transition changes its
total energy :math:`H = f(x) + |r|^2/2` by nothing else. Betancourt's estimate of the
Bayesian fraction of missing information compares those changes with what there is to
travel,

.. math::
    \mathrm{BFMI} = \frac{\sum_n (H_n - H_{n-1})^2}{\sum_n (H_n - \bar H)^2}
    \;\to\; \frac{D}{\mathrm{Var} f(x) + D/2}                               \tag{1}

In equilibrium the momenta before and after a refreshment are independent of each other
and of the point, and :math:`|r|^2/2` has variance :math:`D/2`; so the limit on the
right needs only the energies of the draws.

References:
    Betancourt (2016), Diagnosing suboptimal cotangent disintegrations in Hamiltonian
    Monte Carlo, arXiv:1604.00695.
"""

__all__ = ["energy_bfmi"]

from torch import Tensor


def energy_bfmi(energies: Tensor, num_coordinates: int) -> Tensor:
    r"""Energy Bayesian fraction of missing information (1), for each chain.

    Args:
        energies: :math:`f(x)` of the draws in nats, in the space where the chain moves,
            shape ``(*chains, N)``.
        num_coordinates: ``D``, how many numbers a point of that space has.

    Returns:
        Shape ``chains``; 1 for a Gaussian. Below 0.3 chains are slow to reach the
        tails.

    Raises:
        ValueError: If a chain has fewer than two draws.

    Example:
        >>> x = torch.randn(4, 2000, 10)
        >>> bool((energy_bfmi((x**2).sum(-1) / 2, 10) - 1).abs().max() < 0.2)
        True
    """
    if not energies.shape or energies.shape[-1] < 2:
        raise ValueError(
            "energies must have shape (*chains, N) with at least 2 draws of each "
            f"chain, got {tuple(energies.shape)}."
        )
    spread = energies.double().var(-1)
    return num_coordinates / (spread + num_coordinates / 2)  # (1)
