r""":math:`\log Z` in closed form."""

__all__ = ["closed_form"]

import math

from pyro_ebm.core.verdict import Finding, Reason, Status, status_of
from pyro_ebm.energies import Energy
from pyro_ebm.partition.base import LogPartitionEstimate


def closed_form(energy: Energy) -> LogPartitionEstimate | None:
    r""":math:`\log Z` of an energy that knows it, else ``None``.

    Args:
        energy: Any energy.

    Returns:
        The estimate, of status ``"exact"`` and for no evaluation of the energy;
        ``"unreliable"`` if the value is ``nan`` or infinite.

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
    found = _findings(value)
    status = status_of(found, Status.EXACT)
    return LogPartitionEstimate(
        value, 0.0, value, value, math.nan, status, "closed form", 0, found
    )


def _findings(value: float) -> tuple[Finding, ...]:
    """What speaks against a value of log Z."""
    if math.isfinite(value):
        return ()
    detail = f"log Z in closed form is {value}: look for nan or inf in the parameters"
    if value == -math.inf:
        detail = "no point is allowed: the energy is infinite at all of them"
    return (Finding(Reason.NOT_FINITE, detail),)
