"""The effect handler that puts an objective at the energy sites of a Pyro model.

``log_prob`` of an energy is pure, and has no gradient of ``log Z``. While parameters
are learned, the handler replaces the distribution at each energy site by one whose
``log_prob`` has the same value and the gradient of the objective. Because it stands
where the distribution stood, inside its ``.mask``, ``.to_event`` and ``.expand``, both
terms of eq. (1.16) see the same plates, scales, masks and subsampling, under any ELBO.
"""

__all__ = ["ObjectiveModel", "maximum_likelihood"]

from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution, MixtureOfExperts
from pyro_ebm.infer.checks import require_learnable
from pyro_ebm.infer.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.objective import Objective, Surrogate
from pyro_ebm.mcmc import PersistentChains


def maximum_likelihood(model: Callable[..., Any], **settings: Any) -> "ObjectiveModel":
    r"""Make a Pyro model learn the energies in it by maximum likelihood.

    Args:
        model: Any Pyro model with an :class:`EnergyDistribution` at one or more sites.
        **settings: See :class:`MaximumLikelihood`.

    Returns:
        A model for ``SVI`` under any ELBO. The model itself still goes to NUTS,
        Predictive and ``poutine.condition``.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> energy_model = pyro_ebm.EnergyModel(energy)
        >>> def model(data):
        ...     pyro.module("energy", energy_model)
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("x", energy_model(), obs=data)
        >>> svi = pyro.infer.SVI(
        ...     pyro_ebm.infer.maximum_likelihood(model, num_chains=64),
        ...     lambda data: None,
        ...     pyro.optim.Adam({"lr": 1e-2}),
        ...     loss=pyro.infer.Trace_ELBO(),
        ... )
        >>> isinstance(svi.step(torch.randn(100, 2)), float)
        True
    """
    return ObjectiveModel(model, MaximumLikelihood(**settings))


class ObjectiveModel(nn.Module):
    """A Pyro model whose energy sites carry an objective.

    Chains of an energy that belongs to no :class:`~pyro_ebm.distributions.EnergyModel`
    are kept here, by site, and are in the ``state_dict``.

    Args:
        model: A Pyro model.
        objective: What is put at the energy sites while gradients are on. Under
            ``torch.no_grad`` the model is left as it is.
    """

    def __init__(self, model: Callable[..., Any], objective: Objective) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}.")
        self.model = model
        self.objective = objective
        self.chains = nn.ModuleDict()
        self._checked: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the objective at its energy sites."""
        with _ObjectiveMessenger(self):
            return self.model(*args, **kwargs)

    def chains_of(
        self, name: str, distribution: EnergyDistribution
    ) -> PersistentChains:
        """The persistent chains for a site."""
        if distribution.owner is not None:
            return distribution.owner.chains
        key = name.replace(".", "/")
        chains = self.chains[key] if key in self.chains else PersistentChains()
        self.chains[key] = chains
        return cast(PersistentChains, chains)

    def check(
        self, name: str, distribution: EnergyDistribution, latents: list[Tensor]
    ) -> None:
        """Refuse or warn, once a site, where learning would fail silently."""
        if name not in self._checked:
            self._checked.add(name)
            require_learnable(name, distribution, latents)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        # Chains are made at a site's first use: make those that were saved.
        start = f"{prefix}chains."
        for key in state_dict:
            if key.startswith(start):
                site = key[len(start) :].split(".")[0]
                if site not in self.chains:
                    self.chains[site] = PersistentChains()
        super()._load_from_state_dict(state_dict, prefix, *args)


class _ObjectiveMessenger(Messenger):
    """One run of a model: each energy is worked on once, however many its sites."""

    def __init__(self, owner: ObjectiveModel) -> None:
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
        if isinstance(distribution, MixtureOfExperts) and isinstance(
            self.owner.objective, MaximumLikelihood
        ):  # each expert with its own log Z, hence with chains of its own
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
            chains = self.owner.chains_of(name, distribution)
            # What the sampler does inside is no part of the model.
            with pyro.poutine.block():
                surrogate = self.owner.objective.surrogate(distribution, chains)
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
        return new

    def log_prob(self, x: Tensor) -> Tensor:
        return self.surrogate(self._expanded(x))


def _map_energy(
    fn: Any, replace: Callable[[EnergyDistribution], EnergyDistribution]
) -> Any:
    """Replace the energy distribution inside Pyro's wrappers, if there is one."""
    if isinstance(fn, EnergyDistribution):
        return replace(fn)
    inner = getattr(fn, "base_dist", None)
    if inner is None:
        return fn
    new = _map_energy(inner, replace)
    if new is inner:
        return fn
    if isinstance(fn, dist.Independent):
        return new.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return new.mask(fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return new.expand(fn.batch_shape)
    raise NotImplementedError(
        f"an EnergyDistribution inside {type(fn).__name__} cannot be learned by "
        "maximum likelihood. Independent (.to_event), .mask and .expand can."
    )
