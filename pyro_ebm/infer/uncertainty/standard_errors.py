r"""Standard errors of the parameters of an energy.

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

__all__ = ["ParameterErrors", "parameter_errors"]

import copy
import itertools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ebm.core.validation import as_tensor
from pyro_ebm.core.verdict import (
    Finding,
    Reason,
    Status,
    in_words,
    sentence,
    status_of,
)
from pyro_ebm.distributions import EnergyDistribution, EnergyModel
from pyro_ebm.energies import Energy
from pyro_ebm.infer.objectives.contrast.noise import LearnedLogPartition
from pyro_ebm.infer.objectives.likelihood.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.objectives.objective import (
    Objective,
    as_distribution,
    require_objective,
)
from pyro_ebm.infer.uncertainty.estimating_equations import (
    Equation,
)

#: Above this number of parameters their covariance is neither affordable nor of use.
_MAX_PARAMETERS = 1000
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


@torch.enable_grad()
def parameter_errors(
    model: Energy | EnergyModel | EnergyDistribution,
    data: Any,
    objective: Objective | None = None,
    *,
    state: nn.Module | None = None,
    covariance: Literal["sandwich", "information"] = "sandwich",
    draws: Tensor | None = None,
    num_redraws: float = math.inf,
) -> ParameterErrors:
    r"""Standard errors of what an energy has learned; for few parameters.

    The errors are those of a finite sample of data: how much the parameters would vary
    if new data were drawn and the fit repeated to its end. What an optimiser has left
    undone is not in them, but is looked for: where the solution is more than half a
    standard error away, the status is ``"unreliable"``.

    Args:
        model: With the parameters that were found; those with ``requires_grad`` count,
            the others are taken for known. After :func:`~pyro_ebm.fit`, the
            :class:`~pyro_ebm.EnergyModel`.
        data: That they were fitted to, shape ``(*batch, *event)``; independent points,
            in a tensor, an array or a table of pandas.
        objective: By what; default: ``MaximumLikelihood()``. All estimators of the
            likelihood have the same errors but for ``num_redraws``.
        state: What the objective has learned beside the energy, ``ObjectiveLoss.state``
            or ``FitResult.state``; needed where that is a log Z, whose error is given
            too.
        covariance: ``"sandwich"``, or ``"information"``, of the likelihood only:
            less variable at few data, and wrong unless the energy can be theirs.
        draws: Independent draws of the model, shape ``(C, *event)``, for expectations
            under it. Default: a sum over its space if that is finite or has at most
            three dimensions, else 4,096 draws by its sampler.
        num_redraws: How many independent draws of the objective's own randomness lie
            behind the parameters: noise points, directions or perturbations of each
            point, chains or proposals of a step. 1 if it was drawn once and held; the
            default, infinity, if it was drawn anew at each of many steps and the
            parameters averaged, as :func:`~pyro_ebm.fit` does.

    Raises:
        NotImplementedError: If the objective solves no equation that is known here.
        TypeError: If an argument is of another type.
        ValueError: If there is no parameter or more than 1,000, no more data than
            parameters, an argument out of range, or a direction in which the parameters
            can move without any effect: the message names it.

    Exactness: *consistent* in the number of data.

    Cost: one backward pass over the data a parameter; 8 of them where an objective
    other than the likelihood draws something.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> data = 2 * torch.randn(400, 1) + 1
        >>> precision = 1 / data.var(0, correction=0).diag()
        >>> energy = pyro_ebm.energies.QuadraticEnergy(data.mean(0), precision)
        >>> errors = parameter_errors(energy, data)
        >>> errors.names, errors.status
        (('loc[0]', 'log_diagonal[0]'), 'ok')
        >>> errors.std_error  # in the limit 2 / 20 and 1 / sqrt(800)
        tensor([0.10, 0.04], dtype=torch.float64)
    """
    objective = MaximumLikelihood() if objective is None else objective
    require_objective(objective)
    distribution = as_distribution(model)
    energy = distribution.energy
    data = as_tensor("data", data, **energy.tensor_options())
    num_points = energy.batch_shape_of(data).numel()
    x = data.detach().reshape(num_points, *energy.event_shape)
    _require_settings(objective, covariance, num_redraws)
    own_state = _state_for(objective, state, energy)
    named = _named_parameters(energy, objective, own_state)
    names, parameters = _entry_names(named), [p for _, p in named]
    _require_points(x, len(names))
    if objective.is_pointwise:
        equation = Equation.of_likelihood(
            distribution, objective, parameters, x, draws, covariance, num_redraws
        )
    else:
        equation = Equation.of_objective(
            distribution, objective, own_state, parameters, x, num_redraws
        )
    _require_derivatives(equation, names)
    estimate = torch.cat([p.detach().flatten() for p in parameters]).double()
    kept = [name for name, keep in zip(names, equation.has_effect, strict=True) if keep]
    solved = _Solved(
        kept, estimate[equation.has_effect], equation.where_it_has_effect(), num_points
    )
    solved.require_identified(parameters[0].dtype)
    return solved.errors(covariance, [*objective.bias()])


class _Solved(NamedTuple):
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


# What is learned ---------------------------------------------------------------------


def _state_for(
    objective: Objective, state: nn.Module | None, energy: Energy
) -> nn.Module:
    """A state of our own, at which the objective can be evaluated.

    Raises:
        NotImplementedError: If the objective solves no equation that is known.
        TypeError: If the state is that of another objective.
        ValueError: If it is missing.
    """
    fresh = objective.make_state()
    if objective.is_pointwise:
        return fresh
    learns = any(True for _ in fresh.parameters())
    knows = not learns or isinstance(fresh, LearnedLogPartition)
    moves = {"chains", "generator"} & objective.needs
    if not knows or (moves and not objective.starts_at_data):
        raise NotImplementedError(
            f"{type(objective).__name__} solves no equation of the data whose errors "
            "are known: what it learns or moves beside the energy depends on the "
            "parameters. Fit on by MaximumLikelihood, or take the bootstrap."
        )
    if state is None and not learns:
        return fresh.to(**energy.tensor_options())
    if state is None or not bool(getattr(state, "is_started", True)):
        raise ValueError(
            f"{type(objective).__name__} learns log Z beside the energy, and state "
            "does not hold it: give ObjectiveLoss.state, or FitResult.state."
        )
    if not isinstance(state, type(fresh)):
        raise TypeError(
            f"state must be the {type(fresh).__name__} of {type(objective).__name__}, "
            f"got {type(state).__name__}."
        )
    return copy.deepcopy(state)


def _named_parameters(
    energy: Energy, objective: Objective, state: nn.Module
) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = [
        (name, p) for name, p in energy.named_parameters() if p.requires_grad
    ]
    if isinstance(state, LearnedLogPartition) and not objective.is_pointwise:
        # What a flow learns has no effect on the rest: to first order, any will do.
        if state.log_partition.requires_grad:
            named.append(("log_partition", state.log_partition))
    if not named:
        raise ValueError(
            "model must have parameters with requires_grad, got none. After fit, give "
            "the EnergyModel: the distribution that fit returns is a frozen copy."
        )
    return named


def _entry_names(named: list[tuple[str, Tensor]]) -> list[str]:
    return [
        f"{name}[{','.join(map(str, index))}]" if index else name
        for name, parameter in named
        for index in itertools.product(*map(range, parameter.shape))
    ]


# Bad input ---------------------------------------------------------------------------


def _require_settings(
    objective: Objective, covariance: str, num_redraws: float
) -> None:
    if covariance not in ("sandwich", "information"):
        raise ValueError(
            f"covariance must be 'sandwich' or 'information', got {covariance!r}."
        )
    if covariance == "information" and not objective.is_pointwise:
        raise ValueError(
            "covariance must be 'sandwich' for an objective other than the likelihood: "
            f"the information says nothing of {type(objective).__name__}."
        )
    if not num_redraws >= 1:
        raise ValueError(f"num_redraws must be at least 1, got {num_redraws}.")


def _require_points(x: Tensor, num_parameters: int) -> None:
    if num_parameters > _MAX_PARAMETERS:
        raise ValueError(
            f"model has {num_parameters:,} parameters, more than {_MAX_PARAMETERS:,}: "
            "their covariance would say little of a network. Hold most of them by "
            "requires_grad_(False), for errors given the rest, or report the error of "
            "what the model says, as log_likelihood_difference does."
        )
    if len(x) <= num_parameters:
        raise ValueError(
            f"data must hold more points than there are parameters, {num_parameters}; "
            f"got {len(x)}."
        )
    if not x.isfinite().all():
        raise ValueError(
            f"data must be finite, got {int((~x.isfinite()).sum())} numbers that are "
            "not. Drop those points."
        )


def _require_derivatives(equation: Equation, names: list[str]) -> None:
    is_finite = (equation.curvature + equation.spread).isfinite().all(0)
    if not is_finite.all():
        raise ValueError(
            "the derivatives of the objective must be finite at the data and under the "
            f"model, and are not in {names[int((~is_finite).int().argmax())]!r}. Look "
            "for points at the edge of the support, or where the energy overflows."
        )
    if not equation.has_effect.any():
        raise ValueError(
            f"model must have a parameter that its energy depends on, got {names}. "
            "Does the energy detach them, or copy them when it is built?"
        )
