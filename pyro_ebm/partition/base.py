r"""The result of an estimate of a partition function.

.. math::
    \log Z = \log \int_{\mathcal X} e^{-f(x)}\, dx

Every estimator of this package returns a :class:`LogPartitionEstimate`: a value, an
error bar, and a verdict in words.
"""

__all__ = ["LogPartitionEstimate", "combine_replicates", "student_t_quantile"]

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.core.html import rows_table
from pyro_ebm.core.verdict import Finding, Status, in_words, sentence
from pyro_ebm.diagnostics import log_mean_exp


class LogPartitionEstimate(NamedTuple):
    r"""An estimate of :math:`\log Z` in nats, with its error and verdict.

    Attributes:
        value: The estimate.
        std_error: Its standard error.
        lower: Lower end of the 95 % interval.
        upper: Upper end of the 95 % interval.
        ess: Effective sample size behind it, a number of draws; ``nan`` where there are
            no weights.
        status: ``"exact"``, ``"ok"``, ``"unreliable"`` or ``"not_normalizable"``.
        method: The estimator that was used.
        num_evaluations: Energy evaluations spent, one a point, with gradient or not.
        reasons: The findings that led to the status; empty if nothing speaks against
            the estimate.
        num_seconds: Seconds that it took; ``nan`` where they were not counted.

    Example:
        >>> energy = pyro_ebm.energies.FunctionEnergy(lambda x: x**2 / 2, ())
        >>> found = pyro_ebm.partition.estimate(energy)
        >>> found.status, round(found.value, 4), found.is_reliable
        ('exact', 0.9189, True)
    """

    value: float
    std_error: float
    lower: float
    upper: float
    ess: float
    status: Status
    method: str
    num_evaluations: int
    reasons: tuple[Finding, ...] = ()
    num_seconds: float = math.nan

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"exact"`` or ``"ok"``."""
        return Status(self.status).is_reliable

    def __str__(self) -> str:
        return (
            f"log Z = {self.value:.4f} +- {self.std_error:.4f} "
            f"[{in_words(self.status, self.reasons)}] by {self.method}, "
            f"{self.num_evaluations:,} energy evaluations"
        )

    def _repr_html_(self) -> str:
        rows = {
            "log Z": f"{self.value:.4f} +- {self.std_error:.4f} nats",
            "95 % interval": f"{self.lower:.4f} to {self.upper:.4f}",
            "verdict": in_words(self.status, self.reasons),
            "method": self.method,
            "energy evaluations": f"{self.num_evaluations:,}",
            "effective sample size": "" if math.isnan(self.ess) else f"{self.ess:,.0f}",
        }
        return rows_table("Log partition function", rows)


def combine_replicates(log_partitions: Tensor) -> tuple[float, float, float]:
    r"""Value, standard error and half-width from independent replicates.

    The value is the logarithm of the mean of :math:`\hat Z_i`; the spread of
    :math:`\log \hat Z_i` gives the error, and Student's t with ``M - 1`` degrees of
    freedom the 95 % half-width.

    Args:
        log_partitions: :math:`\log \hat Z_i`, shape ``(M,)`` with ``M >= 2``.

    Returns:
        Value, standard error and half-width, in nats.

    Example:
        >>> value, std_error, half_width = combine_replicates(torch.zeros(4))
        >>> value, std_error
        (0.0, 0.0)
    """
    num_replicates = len(log_partitions)
    if num_replicates < 2:
        raise ValueError(
            f"log_partitions must hold at least 2 replicates for an error bar, got "
            f"{num_replicates}."
        )
    value = log_mean_exp(log_partitions).item()
    std_error = log_partitions.std().item() / math.sqrt(num_replicates)
    return value, std_error, student_t_quantile(num_replicates - 1) * std_error


@functools.cache
def student_t_quantile(degrees: int, probability: float = 0.975) -> float:
    """Quantile of Student's t distribution, by quadrature and bisection.

    Args:
        degrees: Degrees of freedom, at least 1.
        probability: Between 0.5 and 1.

    Example:
        >>> round(student_t_quantile(3), 3)
        3.182
    """
    # With t = tan(phi) sqrt(n) the density becomes cos(phi)^(n - 1).
    phi = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(phi.cos() ** (degrees - 1), phi)
    index = int(torch.searchsorted(mass / mass[-1], 2 * probability - 1))
    return math.tan(phi[index + 1].item()) * math.sqrt(degrees)
