r"""The prior of a Pyro model as a normalised distribution over unconstrained space.

It is one end of the path from prior to posterior, along which the log evidence is the
difference in log Z:

.. math::
    \log p(y) = \log \mathbb{E}_{u \sim p(u)}\left[ e^{f_0(u) - f(u)} \right],
    \qquad f_0(u) = -\log p(u)                                              \tag{1}
"""

__all__ = ["ModelPrior", "prior_model"]

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, final

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions import constraints
from pyro.poutine import Trace
from torch import Tensor

from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.graph_recording import LinAlgError
from pyro_ebm.energies.missing_data import with_missing_data
from pyro_ebm.energies.model_checks import is_masked
from pyro_ebm.energies.model_runs import (
    FailuresAreNan,
    Model,
    WithoutValidation,
    run_until,
    samples,
)
from pyro_ebm.energies.model_sites import ModelSites
from pyro_ebm.energies.normalization import unnormalized_part

#: Runs that may all fail before that is an error of the model.
_MAX_FAILURES = 20
#: Draws of a vectorised run whose densities are compared with those of the energy.
_NUM_CHECKED = 4


def prior_model(model: Model, trace: Trace) -> Model:
    """The model without its observed sites and factors.

    Args:
        model: A Pyro model.
        trace: A run of it.

    Raises:
        NotImplementedError: If the prior is not normalised: a latent site is scaled,
            masked or improper, an energy whose log Z is unknown, or has a density that
            a reparametriser gave it.
    """
    sites = samples(trace)
    for name, site in sites:
        _require_normalized(name, site)
    continuous = [
        number
        for number, (_, site) in enumerate(sites)
        if not site["is_observed"] and not site["fn"].support.is_discrete
    ]
    # Discrete sites that no continuous one follows sum to one: any value will do.
    ignored = {
        name: site["value"]
        for name, site in sites[max(continuous) + 1 :]
        if not site["is_observed"]
    }
    model = with_missing_data(model)
    conditioned = poutine.condition(model, ignored) if ignored else model
    return poutine.block(conditioned, hide_fn=_is_observed)


@final
class ModelPrior(dist.TorchDistribution):
    """The prior of a Pyro model's latent sites, in unconstrained space.

    Made by :attr:`pyro_ebm.energies.PyroModelEnergy.prior`.

    Args:
        energy: Minus the log prior density, normalised, over all real ``u``.
        model: The Pyro model without its observed sites; it is run to draw.
        args: Arguments of the model.
        kwargs: Arguments of the model.
        sites: Its latent sites.

    Attributes:
        energy: As given; its ``value_and_grad`` is the fast way to the gradient.

    Exactness: ``log_prob`` and ``sample`` are *exact*.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        energy: Energy,
        model: Model,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sites: ModelSites,
    ) -> None:
        self.energy = energy
        self._model, self._args, self._kwargs = model, args, kwargs
        self._sites = sites
        self._is_vectorized: bool | None = None  # not known before the first draws
        super().__init__(torch.Size(), energy.event_shape, validate_args=False)

    def with_energy(self, energy: Energy) -> "ModelPrior":
        """The same distribution, its density given by another energy."""
        new = copy.copy(self)
        new.energy = energy
        return new

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ModelPrior":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log prior density at ``value`` of shape ``(*sample, *batch, D)``."""
        log_prob = -self.energy(value)
        shape = torch.broadcast_shapes(log_prob.shape, self.batch_shape)
        return log_prob.expand(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, by running the model.

        All at once inside one more plate where the model is written for that, which is
        checked by their densities; else one run a draw.

        Args:
            sample_shape: Shape of the draws.

        Returns:
            Shape ``(*sample, *batch, D)``.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        num_draws = shape[:-1].numel()
        if num_draws == 0:
            return self._sites.example.new_empty(shape)
        u = None
        if num_draws > 1 and self._is_vectorized is not False:
            u = self._many(num_draws)
            self._is_vectorized = u is not None
        if u is None:
            u = self._one_by_one(num_draws)
        return u.reshape(shape).to(**self.energy.tensor_options())

    def _one_by_one(self, num_draws: int) -> Tensor:
        draws, failure = [], None
        for _ in range(num_draws):
            try:
                trace, flat = self._run(self._model)
            except (ValueError, LinAlgError) as error:  # at this draw
                failure = error
                draws.append(torch.full_like(self._sites.example, torch.nan))
            else:
                values = {name: site["value"] for name, site in samples(trace)}
                draws.append(self._sites.unconstrain(values, flat))
        u = torch.stack(draws)
        if failure is not None and num_draws > _MAX_FAILURES and u.isnan().all():
            raise failure
        return u

    def _run(self, model: Model) -> tuple[Trace, dict[str, Tensor]]:
        last = list(self._sites.shapes)[-1]
        return run_until(last, model, self._args, self._kwargs)

    def _many(self, num_draws: int) -> Tensor | None:
        """Draws of one vectorised run, or ``None`` where that does not work."""
        dim = -1 - self._sites.max_plate_nesting
        plate = pyro.plate("_pyro_ebm_draws", num_draws, dim=dim)
        for is_validated in (True, False):  # a draw may have no distribution after it
            checks = contextlib.nullcontext() if is_validated else _without_errors()
            try:
                with checks:
                    u = self._checked(*self._run(plate(self._model)), num_draws)
            except (ValueError, RuntimeError, IndexError):  # not written for batches
                continue
            return u
        return None

    def _checked(
        self, trace: Trace, flat: dict[str, Tensor], num_draws: int
    ) -> Tensor | None:
        values, log_prob = {}, torch.zeros(())
        for name, site in samples(trace):
            if name not in self._sites.shapes:
                return None  # discrete: summed out in the energy, so not comparable
            shape = self._sites.shapes[name]
            values[name] = site["value"].reshape((num_draws, *shape))
            site_log_prob = site["fn"].log_prob(site["value"])
            log_prob = log_prob + site_log_prob.reshape(num_draws, -1).sum(-1)
        known = {
            name: part.reshape((num_draws, *self._sites.flat_shapes[name]))
            for name, part in flat.items()
        }
        u = self._sites.unconstrain(values, known)
        if self._is_vectorized:
            return u
        log_prob = log_prob + self._sites.log_abs_det(u, values)
        # Not far out, where a bijection saturates in single precision only.
        size = u.abs().amax(-1).where(log_prob.isfinite(), torch.inf)
        checked = size.argsort()[: min(_NUM_CHECKED, int(log_prob.isfinite().sum()))]
        options = self.energy.tensor_options()
        expected = -self.energy(u[checked].to(**options)).to(log_prob)
        is_same = torch.allclose(log_prob[checked], expected, rtol=1e-3, atol=1e-3)
        return u if is_same and len(checked) else None


@contextlib.contextmanager
def _without_errors() -> Iterator[None]:
    """A draw that has no density gives nan, not an error for all the others."""
    with WithoutValidation(), FailuresAreNan():
        yield


def _is_observed(site: Any) -> bool:
    return site["type"] == "sample" and bool(site["is_observed"])


def _require_normalized(name: str, site: dict[str, Any]) -> None:
    fn = site["fn"]
    reason = ""
    if site["is_observed"]:
        if isinstance(fn, dist.Delta) and torch.as_tensor(fn.log_density).any():
            reason = "is given and has a log_density of its own"
    elif isinstance(fn, dist.ImproperUniform):
        reason = "is improper"
    elif torch.as_tensor(site["scale"] != 1).any():
        reason = "is scaled"
    elif is_masked(site):
        reason = "is masked"
    elif unnormalized_part(fn) is not None:
        reason = "is an energy whose log Z is unknown or unreliable"
    if reason:
        raise NotImplementedError(
            f"the prior of the model is not a normalised density: site {name!r} "
            f"{reason}. Without a prior there is no path from it to the posterior; "
            "give another normalised base over energy.event_shape."
        )
