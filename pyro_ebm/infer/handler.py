"""Learning the energies in a Pyro program by any estimator.

While parameters are learned, an effect handler replaces the distribution at each energy
site by one whose ``log_prob`` has the same value, the same gradient in the point, and
in the parameters the gradient of the objective. Because it stands where the
distribution stood, inside its ``.mask``, ``.to_event`` and ``.expand``, both terms of
eq. (1.16) see the same plates, scales, masks and subsampling, under any ELBO.

For loops without Pyro an objective is a loss of plain torch.
"""

__all__ = ["Learn", "ObjectiveLoss", "require_learnable", "state_for"]

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import pyro
import pyro.distributions as dist
import pyro.nn.module
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_ebm.core.errors import UnregisteredParameterWarning
from pyro_ebm.distributions import EnergyDistribution, EnergyModel, MixtureOfExperts
from pyro_ebm.distributions.model import an_objective_learns
from pyro_ebm.energies import Energy
from pyro_ebm.energies.corrections import parts_of
from pyro_ebm.energies.discrete.finite import finite_values
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.pyro_modules import leaves_of
from pyro_ebm.infer.objectives.objective import (
    Objective,
    Surrogate,
    as_distribution,
    require_objective,
)
from pyro_ebm.mcmc import IndependentChains, PersistentChains


class Learn(nn.Module):
    """A Pyro program that learns the energies in it by an estimator.

    Plain ``SVI`` learns an :class:`~pyro_ebm.EnergyModel` by maximum likelihood; this
    is for the estimators that are no likelihood, such as score matching and noise
    contrast, and for likelihoods with settings of their own. The program itself still
    goes to NUTS, ``Predictive`` and ``poutine.condition``.

    What the objective learns or remembers beside the energy is kept here, by site, and
    is in the ``state_dict``; chains of an energy that belongs to an
    :class:`~pyro_ebm.EnergyModel` are kept there. Pyro's parameter store
    knows what is learned as ``"<site>.objective$$$<name>"``, so ``SVI`` trains it.

    Args:
        program: Any Pyro model with an :class:`~pyro_ebm.EnergyDistribution` at one or
            more sites.
        objective: The estimator, put at the energy sites while gradients are on. Under
            ``torch.no_grad`` the program is left as it is.

    Raises:
        TypeError: If the program cannot be called, or ``objective`` is none.

    Example:
        >>> energy_model = pyro_ebm.EnergyModel(
        ...     pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        ... )
        >>> def program(data):
        ...     pyro.module("energy", energy_model)
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("x", energy_model(), obs=data)
        >>> svi = pyro.infer.SVI(
        ...     pyro_ebm.infer.Learn(program, pyro_ebm.infer.ScoreMatching()),
        ...     lambda data: None,
        ...     pyro.optim.Adam({"lr": 1e-2}),
        ...     loss=pyro.infer.Trace_ELBO(),
        ... )
        >>> isinstance(svi.step(torch.randn(100, 2)), float)
        True
    """

    def __init__(self, program: Callable[..., Any], objective: Objective) -> None:
        super().__init__()
        if not callable(program):
            raise TypeError(f"program must be callable, got {type(program).__name__}.")
        require_objective(objective)
        self.program = program
        self.objective = objective
        self.states = nn.ModuleDict()
        self._checked: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the objective at its energy sites.

        Raises:
            NotImplementedError: Under torch's JIT, or if an energy is inside of another
                distribution than a mixture of experts.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise NotImplementedError(
                "a model that learns an energy cannot be traced by torch's JIT: its "
                "chains, and the average over the steps, would be left as they were in "
                "the first step. Use the ELBO without Jit in its name."
            )
        with _ObjectiveMessenger(self), an_objective_learns():
            return self.program(*args, **kwargs)

    @property
    def chains(self) -> dict[str, PersistentChains]:
        """The chains among the states, by site."""
        states = self.states.items()
        return {k: s for k, s in states if isinstance(s, PersistentChains)}

    def state_of(self, name: str, distribution: EnergyDistribution) -> nn.Module:
        """What the objective learns or remembers at a site, known to Pyro."""
        key = name.replace(".", "/")
        if key not in self.states:
            state = self.objective.make_state()
            if isinstance(state, PersistentChains) and distribution.owner is not None:
                chains: PersistentChains = distribution.owner.chains
                return chains
            self._require_unshared(name, state)
            self.states[key] = state.to(**distribution.energy.tensor_options())
        if any(True for _ in self.states[key].parameters()):
            # What the store knows by this name is what the optimiser moves.
            pyro.module(f"{key}.objective", self.states[key], update_module_params=True)
        return self.states[key]

    def _require_unshared(self, name: str, state: nn.Module) -> None:
        used = {id(parameter) for parameter in self.states.parameters()}
        if any(id(parameter) in used for parameter in state.parameters()):
            raise ValueError(
                f"{type(self.objective).__name__} trains one module for one energy, "
                f"and site {name!r} has another energy than {[*self.states]}. Fit the "
                "energies one by one."
            )

    def check(
        self, name: str, distribution: EnergyDistribution, latents: list[Tensor]
    ) -> None:
        """Refuse or warn, once a site, where learning would fail silently."""
        if name not in self._checked:
            self._checked.add(name)
            require_learnable(name, distribution, latents, self.objective)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        # States are made at a site's first use: make those that were saved.
        start = f"{prefix}states."
        for key in state_dict:
            if key.startswith(start):
                site = key[len(start) :].split(".")[0]
                if site not in self.states:
                    self.states[site] = self.objective.make_state()
        super()._load_from_state_dict(state_dict, prefix, *args)


@final
class ObjectiveLoss(nn.Module):
    """The mean of an objective over a batch, negated: a module to minimise.

    Its parameters are those of the energy and what the objective learns beside it, such
    as the log Z of noise contrast or a generator; its ``state_dict`` holds chains too.
    Under SVI, :class:`~pyro_ebm.infer.Learn` takes the same steps.

    Args:
        model: What is learned. Of an :class:`~pyro_ebm.EnergyModel`, log Z follows the
            parameters at each call.
        objective: The estimator.

    Raises:
        TypeError: If an argument is of another type.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> loss = ObjectiveLoss(energy, pyro_ebm.infer.MaximumLikelihood())
        >>> optim = torch.optim.Adam(loss.parameters(), lr=1e-2)
        >>> loss(torch.randn(100, 2)).backward()
        >>> optim.step()
    """

    def __init__(self, model: Energy | EnergyModel, objective: Objective) -> None:
        super().__init__()
        if not isinstance(model, Energy | EnergyModel):
            raise TypeError(
                f"model must be an Energy or EnergyModel, got {type(model).__name__}. "
                "Wrap a callable in pyro_ebm.energies.FunctionEnergy."
            )
        require_objective(objective)
        self.model = model
        self.objective = objective
        self.state = state_for(objective, model)
        self._is_checked = False

    def forward(self, x: Tensor) -> Tensor:
        """Minus the mean objective at data ``x`` of shape ``(*batch, *event)``."""
        distribution = as_distribution(self.model)
        if not self._is_checked:
            self._is_checked = True
            with _points_of(distribution) as points:
                self.objective.check(distribution, points)
        if distribution.owner is not None and torch.is_grad_enabled():
            distribution.owner.follow()
        return self.objective.loss(distribution, x, self.state)


def state_for(objective: Objective, model: Energy | EnergyModel) -> nn.Module:
    """A state for an objective, where the model's parameters are.

    Args:
        objective: The estimator.
        model: What is learned; an :class:`~pyro_ebm.EnergyModel` keeps its own chains.
    """
    state = objective.make_state()
    if isinstance(state, PersistentChains) and isinstance(model, EnergyModel):
        state = model.chains
    energy = model.energy if isinstance(model, EnergyModel) else model
    return state.to(**energy.tensor_options())


class _ObjectiveMessenger(Messenger):
    """One run of a model: each energy is worked on once, however many its sites."""

    def __init__(self, owner: Learn) -> None:
        super().__init__()
        self.owner = owner
        self.surrogates: dict[int, Surrogate] = {}
        self.latents: list[Tensor] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not msg["infer"].get("is_auxiliary"):
            msg["fn"] = _map_energy(
                msg["fn"], lambda found: self._with_objective(msg["name"], found)
            )

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        if not msg["is_observed"] and isinstance(value, Tensor) and value.requires_grad:
            self.latents.append(value)

    def _with_objective(
        self, name: str, distribution: EnergyDistribution
    ) -> EnergyDistribution:
        objective = self.owner.objective
        if isinstance(distribution, MixtureOfExperts):
            # Each expert has its own log Z, hence chains of its own.
            if not objective.is_pointwise:
                raise NotImplementedError(
                    f"{type(objective).__name__} has no gradient of log q(x) at each "
                    f"point, which the mixture at site {name!r} needs of its experts. "
                    "MaximumLikelihood has it."
                )
            return distribution.map_experts(
                lambda k, expert: _map_energy(
                    expert, lambda found: self._with_objective(f"{name}.{k}", found)
                )
            )
        key = id(distribution.energy)
        if key not in self.surrogates:
            self.owner.check(name, distribution, self.latents)
            if distribution.owner is not None:
                distribution.owner.follow()
            state = self.owner.state_of(name, distribution)
            # What the sampler does inside is no part of the model.
            with pyro.poutine.block():
                surrogate = objective.surrogate(distribution, state)
            self.surrogates[key] = surrogate
        return _SurrogateDistribution.of(distribution, self.surrogates[key])


class _SurrogateDistribution(EnergyDistribution):
    """An energy distribution whose ``log_prob`` has the gradient of an objective."""

    @classmethod
    def of(
        cls, distribution: EnergyDistribution, surrogate: Surrogate
    ) -> "_SurrogateDistribution":
        new = cls.__new__(cls)
        new.__dict__.update(vars(distribution))
        new.surrogate = surrogate
        if not new._is_known and new.owner is not None:
            first = new.owner.log_partition.value  # estimated since it was built
            new._log_partition = first.where(first.isfinite(), 0.0)
        return new

    def log_prob(self, x: Tensor) -> Tensor:
        x = self._expanded(x)
        objective, energy = self.surrogate(x.detach())
        value = -energy.detach() - self.log_partition.detach()
        if objective.requires_grad:
            value = value + (objective - objective.detach())
        if x.requires_grad:  # a latent variable: its gradient is that of -f(x)
            _, grad = self.energy.value_and_grad(x)
            moved = grad * (x - x.detach())
            value = value - sum_rightmost(moved, self.energy.event_dim)
        return value


def _map_energy(
    fn: Any, replace: Callable[[EnergyDistribution], EnergyDistribution]
) -> Any:
    """Replace the energy distribution inside Pyro's wrappers, if there is one."""
    if isinstance(fn, EnergyDistribution):
        return replace(fn)
    if not _has_energy(fn):
        return fn
    if isinstance(fn, dist.Independent):
        new = _map_energy(fn.base_dist, replace)
        return new.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _map_energy(fn.base_dist, replace).mask(fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return _map_energy(fn.base_dist, replace).expand(fn.batch_shape)
    raise NotImplementedError(
        f"an EnergyDistribution inside {type(fn).__name__} cannot be learned by "
        "an objective. Inside Independent (.to_event), .mask and .expand it can; for "
        "a mixture take pyro_ebm.distributions.MixtureOfExperts."
    )


def _has_energy(fn: Any) -> bool:
    return any(
        isinstance(part, EnergyDistribution) or _has_energy(part)
        for part in parts_of(fn).values()
    )


# Checks at the first step, for errors that would be silent --------------------------


@contextmanager
def _points_of(distribution: EnergyDistribution, count: int = 64) -> Iterator[Tensor]:
    """Some points of the support, where chains would start, shape ``(N, *event)``.

    In the block gradients are on, and random numbers are those of a fork: a run that
    goes on from a ``state_dict`` checks again, and then draws what the first did.
    """
    energy = distribution.energy
    device = energy.tensor_options()["device"]
    devices = [device] if device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        if finite_values(energy.support) is not None:
            like = torch.empty(0, **energy.tensor_options())
            uniform = IndependentSites.uniform(energy.support, energy.event_shape, like)
            yield uniform.sample(torch.Size((count,)))
        else:
            sampler = distribution.sampler or IndependentChains()
            yield sampler.start(energy, count)


def require_learnable(
    name: str,
    distribution: EnergyDistribution,
    latents: list[Tensor],
    objective: Objective,
) -> None:
    """Check the energy at a site.

    Args:
        name: The site.
        distribution: What stands there.
        latents: Values of the latent sites that the model has drawn before.
        objective: What is put there; it makes checks of its own.

    Raises:
        NotImplementedError: If the energy depends on a latent variable.

    Warns:
        UnregisteredParameterWarning: If a parameter that the energy depends on is not
            the one in Pyro's parameter store.
    """
    energy = distribution.energy
    with _points_of(distribution) as x:
        objective.check(distribution, x)
        value = energy(x).sum()
    if not value.requires_grad:
        return
    if latents:
        grads = torch.autograd.grad(
            value, latents, allow_unused=True, retain_graph=True
        )
        if any(grad is not None for grad in grads):
            raise NotImplementedError(
                f"the energy at site {name!r} depends on a latent variable, so its log "
                "Z does too: an objective is for one energy only. "
                "Make the energy a function of the pair (an energy of a larger event), "
                "or give an exact or amortised log_partition and no handler."
            )
    if not pyro.nn.module._is_module_local_param_enabled():
        _warn_unregistered(name, distribution, leaves_of(value, x))


def _warn_unregistered(
    site: str, distribution: EnergyDistribution, parameters: list[Tensor]
) -> None:
    store = pyro.get_param_store()
    names = {id(p): name for name, p in distribution.energy.named_parameters()}
    missing = [
        names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)} in a closure")
        for leaf in parameters
        if store.param_name(leaf) is None
    ]
    if missing:
        warnings.warn(
            f"the energy at site {site!r} has parameters that Pyro does not know, and "
            f"no optimiser will train: {', '.join(missing)}. Call pyro.module(name, "
            "energy_model) in the model, or make the energy an attribute of a "
            "PyroModule. If it was registered under a name in use before, "
            "pyro.clear_param_store() first.",
            UnregisteredParameterWarning,
            stacklevel=2,
        )
