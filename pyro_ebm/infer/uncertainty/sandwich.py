r"""The sandwich covariance of the solution of an estimating equation.

With slope :math:`A` and spread :math:`B` of the equation that the fit has solved
(:mod:`~pyro_ebm.infer.uncertainty.estimating_equations`), the parameters are in the
limit of many data normal about what the estimator tends to, with the covariance

.. math::
    \Sigma = \frac1n A^{-1} B A^{-\top}                                    \tag{1}

called the sandwich, whether or not the energy can be that of the data. If it can, the
likelihood has :math:`B = A`, and :math:`\Sigma = A^{-1} / n` is what the information
says.

References:
    Huber (1967), Proc. Fifth Berkeley Symposium 1, 221-233. White (1982), Econometrica
    50, 1-25. Gutmann & Hyvarinen (2012), JMLR 13, 307-361 (noise contrast).
"""

__all__ = ["ParameterErrors", "Solved"]

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.core.verdict import (
    Finding,
    Reason,
    Status,
    in_words,
    sentence,
    status_of,
)
from pyro_ebm.infer.uncertainty.estimating_equations import Equation

#: Half-width of a 95 % interval, in standard errors.
_NORMAL_QUANTILE = 1.959963984540054
#: Distance from the solution, in standard errors, that an interval can bear.
_MAX_DISTANCE = 0.5
#: Error in that distance beyond which nothing can be said of it.
_MAX_NOISE = 2.0


class ParameterErrors(NamedTuple):
    r"""Parameters with their errors, ``P`` numbers.

    Attributes:
        names: Of each, such as ``"loc[0]"``. Entries that the energy does not depend on
            are left out.
        estimate: Shape ``(P,)``, in double precision as all that follows.
        covariance: (1), shape ``(P, P)``.
        std_error: Shape ``(P,)``.
        lower: Lower ends of the 95 % intervals, shape ``(P,)``.
        upper: Upper ends.
        method: What the covariance is, and how expectations under the model were taken.
        status: ``"ok"`` or ``"unreliable"``.
        reasons: The findings that led to it; empty if it is ``"ok"``. Of
            ``INCONSISTENT_ESTIMATOR`` or ``BIASED_KERNEL`` alone, the intervals are
            right, but about what the estimator tends to and not about the truth.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1), torch.eye(1))
        >>> _ = energy.requires_grad_(False).loc.requires_grad_()
        >>> data = torch.tensor([[-1.0], [1.0]]).repeat(50, 1)
        >>> errors = pyro_ebm.infer.parameter_errors(energy, data)
        >>> print(errors)  # data.mean() and data.std() / 10
        loc[0]  0.0000 +- 0.1005
        [ok], sandwich of the likelihood by a sum over the space
    """

    names: tuple[str, ...]
    estimate: Tensor
    covariance: Tensor
    std_error: Tensor
    lower: Tensor
    upper: Tensor
    method: str
    status: Status
    reasons: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"ok"``."""
        return self.status.is_reliable

    def __str__(self) -> str:
        width = max(map(len, self.names))
        columns = zip(self.names, self.estimate, self.std_error, strict=True)
        lines = [
            f"{name:{width}}  {x:.4f} +- {error:.4f}" for name, x, error in columns
        ]
        verdict = in_words(self.status, self.reasons)
        return "\n".join([*lines, f"[{verdict}], {self.method}"])


class Solved(NamedTuple):
    """An estimating equation with its solution and the names of the parameters."""

    names: list[str]
    estimate: Tensor
    equation: Equation
    num_points: int

    def require_identified(self, dtype: torch.dtype) -> None:
        """Refuse a direction in which the equation does not change.

        Args:
            dtype: In which it was computed.

        Raises:
            ValueError: If there is one.
        """
        values, vectors = torch.linalg.eigh(self._scaled_curvature())
        flattest = values.abs().argmin()
        if values[flattest].abs() > torch.finfo(dtype).eps ** 0.75 * values.abs().max():
            return
        direction = vectors[:, flattest] / self._scale()
        raise ValueError(
            "the parameters of model cannot be told from data: to the precision of "
            f"{dtype} the objective does not change along "
            f"{_combination(self.names, direction)}, so no error is finite. Hold a "
            "parameter in it by requires_grad_(False), or write the energy without "
            "it. (log Z cancels a constant of the energy; noise contrast knows it, if "
            "its own log_partition is held.)"
        )

    def errors(self, kind: str, biases: list[Finding]) -> ParameterErrors:
        """Evaluate (1), and judge it."""
        scale, equation = self._scale(), self.equation
        inverse = torch.linalg.inv(self._scaled_curvature()) / scale.outer(scale)
        matrix = inverse @ equation.spread @ inverse / self.num_points  # (1)
        std_error = matrix.diagonal().sqrt()
        half_width = _NORMAL_QUANTILE * std_error
        reasons = (
            *self._doubts_of_curvature(),
            *self._doubts_of_place(inverse, std_error),
            *biases,
        )
        return ParameterErrors(
            tuple(self.names),
            self.estimate,
            matrix,
            std_error,
            self.estimate - half_width,
            self.estimate + half_width,
            f"{kind} {equation.how}",
            status_of(reasons),
            reasons,
        )

    def _scale(self) -> Tensor:
        scale = self.equation.scale
        return torch.where(scale > 0, scale, 1.0)

    def _scaled_curvature(self) -> Tensor:
        scale = self._scale()
        return self.equation.curvature / scale.outer(scale)

    def _doubts_of_curvature(self) -> list[Finding]:
        doubts, count = [], len(self.names)
        values, vectors = torch.linalg.eigh(self._scaled_curvature())
        if values[0] < 0:
            direction = _combination(self.names, vectors[:, 0] / self._scale())
            upwards = (
                "the parameters are at no maximum, the objective curves upwards along "
                f"{direction}: fit on from elsewhere"
            )
            doubts.append(Finding(Reason.NOT_CONVERGED, upwards))
        if self.num_points < 10 * count:
            few = (
                f"{self.num_points} points are few for {count} parameters: hold some "
                "parameters, or take the bootstrap"
            )
            doubts.append(Finding(Reason.FEW_EFFECTIVE, few))
        return doubts

    def _doubts_of_place(self, inverse: Tensor, std_error: Tensor) -> list[Finding]:
        step = (inverse @ self.equation.mean).abs()
        noise = inverse @ self.equation.noise @ inverse
        noise = noise.diagonal().clamp(min=0.0).sqrt()
        if (noise > _MAX_NOISE * std_error).any():
            return [Finding(Reason.FEW_EFFECTIVE, self.equation.too_noisy)]
        if (step <= _MAX_DISTANCE * std_error + 3 * noise).all():
            return []
        distances = step / std_error
        worst = int(distances.argmax())
        far = (
            f"{self.names[worst]} is {distances[worst].item():.2g} standard errors "
            "from the solution: fit longer, by smaller steps or on more chains, and "
            "average; if the objective's own noise was drawn once and held, say "
            "num_redraws=1"
        )
        return [Finding(Reason.NOT_CONVERGED, far)]


def _combination(names: list[str], direction: Tensor) -> str:
    """A direction in words, its largest coefficient 1 or -1, its first positive."""
    shares = direction / direction.abs().max()
    kept = shares.abs() > 1e-3
    shares = shares * shares[kept][0].sign()
    terms = [
        f"{share:+.2g} {name}".replace("+1 ", "+ ").replace("-1 ", "- ")
        for name, share, keep in zip(names, shares.tolist(), kept, strict=True)
        if keep
    ]
    return " ".join(terms).removeprefix("+").strip()
