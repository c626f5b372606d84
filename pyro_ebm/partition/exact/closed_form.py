r""":math:`\log Z` in closed form."""

__all__ = ["closed_form"]

import math

from pyro_ebm.core.verdict import Status
from pyro_ebm.energies import Energy
from pyro_ebm.partition.base import LogPartitionEstimate


def closed_form(energy: Energy) -> LogPartitionEstimate | None:
    r""":math:`\log Z` of an energy that knows it, else ``None``.

    Args:
        energy: Any energy.

    Returns:
        The estimate, of status ``"exact"`` and for no evaluation of the energy.

    Exactness: *exact*.

    Example:
        >>> round(
        ...     closed_form(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))).value, 4
        ... )
        1.8379
        >>> closed_form(pyro_ebm.energies.FunctionEnergy(lambda x: x**4, ())) is None
        True
    """
    known = energy.closed_form()
    if known is None:
        return None
    value = known.log_partition.item()
    return LogPartitionEstimate(
        value, 0.0, value, value, math.nan, Status.EXACT, "closed form", 0
    )
