r"""The contract of an estimator of the parameters of an energy.

An objective gives, for each example, a surrogate of :math:`\log q_\theta(x)` whose
gradient in :math:`\theta` estimates that of eq. (1.8),
:math:`L(\theta) = \sum_i \log q_\theta(x^{(i)})`, or leads to the same parameters. One
effect handler (:mod:`pyro_ebm.infer.handler`) puts any objective at the energy sites of
a model; :class:`~pyro_ebm.infer.ObjectiveLoss` makes any a loss of plain torch.

What else a fit or a standard error has to know of an estimator, such as its noise, its
negative points or its bias, the estimator says by the methods below; nothing is read
off its type or the names of its settings.
"""

__all__ = ["Need", "Objective", "Surrogate", "Terms", "require_objective"]

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ebm.core.verdict import Finding
from pyro_ebm.distributions import EnergyDistribution, EnergyModel
from pyro_ebm.distributions.model import an_objective_learns
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.finite import require_inside
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.mcmc import Kernel

#: What an objective may ask of an energy, or of whoever uses it.
Need = Literal["gradient", "second derivatives", "noise", "chains", "grid", "generator"]


class Terms(NamedTuple):
    r"""The objective and the energy at a batch of points.

    Attributes:
        objective: What is maximised, with its gradient in the parameters; shape
            ``(*batch,)``.
        energy: :math:`f_\theta(x)`, computed on the way, in nats; shape ``(*batch,)``.

    Example:
        >>> objective = pyro_ebm.infer.ScoreMatching()
        >>> q = pyro_ebm.EnergyDistribution(
        ...     pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        ... )
        >>> terms = objective.surrogate(q, objective.make_state())(torch.ones(3, 2))
        >>> terms.objective.tolist(), terms.energy.tolist()
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    """

    objective: Tensor
    energy: Tensor


#: Maps points ``(*batch, *event)`` to :class:`Terms`.
Surrogate = Callable[[Tensor], Terms]


class Objective(ABC):
    """An estimator of the parameters of an energy.

    Attributes:
        needs: What it needs of the energy, or of whoever uses it.
        log_partition: How exact the log Z is that it leaves in its state, or ``None``
            where it leaves none.
        is_pointwise: Whether the gradient at each point estimates that of the
            log-likelihood there, and not only its sum over the data.
        starts_at_data: Whether its chains start at the data, and are short: the
            variance of its gradient is then twice its curvature.

    Raises:
        TypeError: If a subclass needs noise and does not define
            :meth:`current_proposal`.

    Example:
        >>> class Likelihood(Objective):  # for energies whose log Z is known
        ...     def surrogate(self, distribution, state):
        ...         log_partition = distribution.energy.closed_form().log_partition
        ...
        ...         def surrogate(x):
        ...             value = distribution.energy(x)
        ...             return Terms(-value - log_partition, value)
        ...
        ...         return surrogate
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> Likelihood().loss(energy, torch.zeros(5, 1))  # log(2 pi) / 2
        tensor(0.9189, grad_fn=...)
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    log_partition: ClassVar[Literal["exact", "consistent"] | None] = None
    is_pointwise: ClassVar[bool] = False
    starts_at_data: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        is_silent = cls.current_proposal is Objective.current_proposal
        if "noise" in cls.needs and is_silent:
            raise TypeError(
                f"{cls.__name__} needs noise, and must say which: define "
                "current_proposal(self, distribution, state), which returns its "
                "distribution. A fit compares it with the data."
            )

    @property
    def name(self) -> str:
        """The estimator's, for people."""
        return type(self).__name__

    def make_state(self) -> nn.Module:
        """A new module for what is learned or remembered beside the energy.

        It takes its sizes at its first use, so that a saved one can be loaded before.
        """
        return nn.Module()

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse, or warn of, what would fail silently; called once.

        Args:
            distribution: At the current parameters.
            x: Some points of its support, shape ``(N, *event)``.

        Raises:
            NotImplementedError: If a gradient is needed and the support is discrete.
            ValueError: If a gradient is needed and the energy has none.
        """
        if "gradient" in self.needs:
            require_differentiable(distribution.energy, x, type(self).__name__)

    @abstractmethod
    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """Do the work of one parameter step that does not depend on the data.

        Args:
            distribution: At the current parameters.
            state: From :meth:`make_state`; the chains of an
                :class:`~pyro_ebm.distributions.EnergyModel` where that is its kind.

        Returns:
            A function of the data, which have no gradient.
        """

    # What it says of itself -----------------------------------------------------------

    def bias(self) -> tuple[Finding, ...]:
        """Why it does not tend to the truth; empty if it is consistent."""
        return ()

    def current_proposal(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Any | None:
        """The noise or proposal at its current parameters, or ``None``.

        Args:
            distribution: What is learned; its model's base may serve.
            state: Of the objective.
        """
        return None

    def num_proposed(self, batch_size: int) -> int:
        """Draws of the proposal in a step.

        Args:
            batch_size: Data points in it.
        """
        return batch_size

    @torch.no_grad()
    def negatives(
        self, distribution: EnergyDistribution, state: nn.Module, num_points: int = 256
    ) -> Tensor | None:
        """Points of the support, shape ``(N, *event)``, at which the energy is raised.

        Args:
            distribution: What is learned.
            state: Of the objective, after a step.
            num_points: How many to draw, of a generator or of noise. Of chains there
                are as many as there are chains.

        Returns:
            ``None`` where it has no negatives, or has not taken a step.
        """
        noise = self.current_proposal(distribution, state)
        if noise is None:
            return None
        drawn: Tensor = noise.sample(torch.Size((num_points,)))
        return drawn.to(**distribution.energy.tensor_options(drawn))

    def mover(self, energy: Energy, state: nn.Module) -> tuple[Kernel, int] | None:
        """The kernel that moves the negatives, and its moves a step, or ``None``.

        Args:
            energy: What is learned.
            state: Of the objective, after a step.
        """
        return None

    def chain_age(self, num_steps: int) -> float | None:
        """Moves since a chain was begun, a mean that the settings imply, or ``None``.

        Args:
            num_steps: Parameter steps so far.
        """
        return None

    def begin(
        self, energy: Energy, draw: Callable[[int], Tensor], state: nn.Module
    ) -> None:
        """Start for an energy that has been learned by another objective.

        Args:
            energy: At its current parameters.
            draw: Maps a number to about so many draws of it.
            state: Of the objective; what it remembers may be set here.
        """
        return

    def second_term_covariance(
        self,
        distribution: EnergyDistribution,
        rows_of: Callable[[Tensor], Tensor],
        covariance: Tensor,
    ) -> Tensor:
        """Covariance of the estimate of the second term of (1.16) in one step.

        Args:
            distribution: At the current parameters.
            rows_of: Maps energies ``(N,)`` to their gradients ``(N, P)``.
            covariance: Of the gradient of the energy under the model, ``(P, P)``.
        """
        return torch.zeros_like(covariance)

    # ----------------------------------------------------------------------------------

    def loss(
        self,
        model: Energy | EnergyModel | EnergyDistribution,
        x: Tensor,
        state: nn.Module | None = None,
    ) -> Tensor:
        """Minus the mean objective, a function for any training loop.

        :class:`~pyro_ebm.infer.ObjectiveLoss` keeps the state, checks what would fail
        silently, and lets log Z follow; this function does none of that.

        Args:
            model: An energy, or what has one.
            x: Data of shape ``(*batch, *event)``.
            state: From :meth:`make_state`; its parameters are for the optimiser too.
                May be left out where the objective remembers nothing.

        Returns:
            A scalar.

        Raises:
            NotImplementedError: If a gradient is needed and the support is discrete.
            ValueError: If the objective needs a state and there is none, or data are
                outside a finite support.
        """
        if state is None:
            state = self.make_state()
            if any(True for _ in state.state_dict()):
                raise ValueError(
                    f"{type(self).__name__} remembers something from step to step: "
                    "make state = objective.make_state() once, give it to each call, "
                    "and its parameters to the optimiser. ObjectiveLoss does so."
                )
        distribution = as_distribution(model)
        energy = distribution.energy
        if "gradient" in self.needs and "chains" not in self.needs:
            _require_continuous(energy, type(self).__name__)
        if is_finite_support(energy.support):  # the energy would not notice
            require_inside(energy.support, x)
        terms = self.surrogate(distribution, state)(x.detach())
        return -terms.objective.mean()


def as_distribution(
    model: Energy | EnergyModel | EnergyDistribution,
) -> EnergyDistribution:
    """The distribution of the current parameters.

    Raises:
        TypeError: If it is none of the three.
    """
    if isinstance(model, EnergyDistribution):
        return model
    if isinstance(model, EnergyModel):
        with an_objective_learns():
            return model.forward()
    if isinstance(model, Energy):
        return EnergyDistribution(model)
    raise TypeError(
        "model must be an Energy, EnergyModel or EnergyDistribution, got "
        f"{type(model).__name__}. Wrap a callable in pyro_ebm.energies.FunctionEnergy."
    )


def require_differentiable(energy: Energy, x: Tensor, objective: str) -> None:
    """Refuse an energy without a gradient in ``x``.

    Raises:
        NotImplementedError: If the support is discrete.
        ValueError: If the energy does not depend on ``x`` by differentiable operations.
    """
    _require_continuous(energy, objective)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = energy(x).sum()
        grad = None
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value, x, allow_unused=True)
    if grad is None:
        raise ValueError(
            f"{objective} needs the gradient of the energy in x, and "
            f"{type(energy).__name__} has none: it detaches x, or compares or rounds "
            "it. Build it from differentiable operations."
        )


def _require_continuous(energy: Energy, objective: str) -> None:
    if energy.support.is_discrete:
        raise NotImplementedError(
            f"{objective} differentiates the energy in x, and the support "
            f"{energy.support} is discrete. Take NoiseContrastive with noise on that "
            "support, or ExactMaximumLikelihood if it has few points; on a mixed one "
            "MaximumLikelihood."
        )


def require_objective(objective: Any) -> None:
    """Check that an objective is one.

    Raises:
        TypeError: If it is no :class:`Objective`.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            "objective must be an Objective such as MaximumLikelihood(), got "
            f"{objective!r}."
        )
