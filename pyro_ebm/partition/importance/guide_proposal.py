r"""A guide of a Pyro model as a proposal over its unconstrained space.

With the bijections :math:`z = T(u)` of :class:`~pyro_ebm.energies.PyroModelEnergy`,

.. math::
    \log q(u) = \log q(z) + \log\left|\det \frac{\partial T}{\partial u}\right| \tag{1}

so that draws are weighed by the energy, a thousand times as fast as by runs of the
model, and mixed with draws of the prior :math:`p_0`, whose weights are then at most
:math:`1 / \alpha` times the likelihood, however narrow the guide is:

.. math::
    w = e^{-f(u)} \big/ \left[(1 - \alpha)\, q(u) + \alpha\, p_0(u)\right]      \tag{2}

References:
    Owen & Zhou (2000), Safe and effective importance sampling, JASA 95, 135-143.
    Hesterberg (1995), Weighted average importance sampling and defensive mixture
    distributions, Technometrics 37, 185-194.
"""

__all__ = [
    "Proposal",
    "as_distribution",
    "log_weights",
    "proposal_of",
    "returned_distribution",
]

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.pyro_model.runs import WithoutValidation, samples
from pyro_ebm.partition.importance.guide_runs import (
    is_auxiliary,
    latent_sites,
    plate_nesting,
)
from pyro_ebm.partition.importance.importance import check_proposal, support_of

#: Share of draws of the prior.
_SHARE = 0.2
#: Draws of the vectorised run that are done again one by one.
_NUM_CHECKED = 4


class Proposal(NamedTuple):
    """A normalised density over ``u``.

    Attributes:
        sample: A number ``N`` to draws and their log density, shapes ``(N, D)`` and
            ``(N,)``; ``inf`` is the density of a draw outside of the support.
        log_prob: Points ``(N, D)`` to their log density, ``(N,)``.
    """

    sample: Callable[[int], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor], Tensor]


def as_distribution(guide: Any) -> Distribution | None:
    """The distribution that a guide is, or that a lazy flow gives; else ``None``.

    Args:
        guide: A distribution, a module that is called for one, such as a zuko flow, or
            a Pyro guide.
    """
    if isinstance(guide, Distribution):
        return guide
    if not isinstance(guide, nn.Module) or isinstance(guide, PyroModule):
        return None
    try:
        with poutine.block():
            found = guide()
    except TypeError:  # it takes the arguments of the model
        return None
    return found if isinstance(found, Distribution) else None


def returned_distribution(trace: Trace) -> Distribution | None:
    """The distribution that a function without latent sites has returned, or ``None``.

    Args:
        trace: A run of it.
    """
    found = trace.nodes["_RETURN"]["value"]
    is_guide = bool(latent_sites(trace)) or not isinstance(found, Distribution)
    return None if is_guide else found


def proposal_of(
    guide: Any,
    trace: Trace | None,
    energy: PyroModelEnergy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Proposal | None:
    """A guide as a proposal over the points of an energy.

    Args:
        guide: A distribution over ``energy.event_shape``, or a Pyro guide.
        trace: A run of the latter.
        energy: Of the model.
        args: Arguments of the guide.
        kwargs: Arguments of the guide.

    Returns:
        The proposal; ``None`` if the guide has not just the continuous latent sites of
        the model, or a density that is known at its own draws only, behind auxiliary
        sites.

    Raises:
        TypeError: If a distribution is none that can propose.
        ValueError: If it has another event or is not normalised.
    """
    if trace is None:
        check_proposal(energy, guide, "guide")
        return _of_vector(guide, energy)
    latent = latent_sites(trace)
    own = {name: site for name, site in latent.items() if not is_auxiliary(site)}
    if own.keys() != energy.site_shapes.keys():
        return None
    if isinstance(guide, AutoContinuous | AutoNormal):
        vector = _vector_of(guide, latent, energy)
        if vector is not None:
            return _of_vector(vector, energy)
    if len(own) < len(latent):
        return None
    runs = _SiteRuns(guide, trace, energy, args, kwargs)
    return Proposal(runs.sample, runs.log_prob)


def log_weights(
    energy: PyroModelEnergy,
    proposal: Proposal,
    prior: dist.TorchDistribution,
    count: int,
) -> Tensor:
    """Log-weights (2) of new draws.

    Args:
        energy: Of the model.
        proposal: Its guide.
        prior: Its prior, or another base.
        count: Draws, a fifth of them from the prior.

    Returns:
        Shape ``(count,)``.

    Exactness: *unbiased for Z*, if the guide or the prior covers the posterior.
    """
    num_prior = max(1, round(_SHARE * count))
    drawn, log_q = proposal.sample(count - num_prior)
    others = prior.sample(torch.Size((num_prior,))).to(drawn)
    # Far out a flow may overflow, where its density is none that counts.
    their_log_q = proposal.log_prob(others).nan_to_num(-torch.inf, neginf=-torch.inf)
    u, log_q = torch.cat([drawn, others]), torch.cat([log_q, their_log_q])
    share = num_prior / count
    log_mixture = torch.logaddexp(
        log_q + math.log1p(-share), prior.log_prob(u) + math.log(share)
    )
    return -energy(u) - log_mixture  # (2)


def _of_vector(vector: Any, energy: PyroModelEnergy) -> Proposal:
    options = energy.tensor_options()

    def log_prob(u: Tensor) -> Tensor:
        value: Tensor = vector.log_prob(u)
        return value.to(u)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        u = vector.sample(torch.Size((count,)))
        return u.to(**options), vector.log_prob(u).to(**options)

    return Proposal(sample, log_prob)


def _vector_of(
    guide: Any, latent: Mapping[str, Any], energy: PyroModelEnergy
) -> dist.TorchDistribution | None:
    """The density behind an autoguide, if its vector is that of the energy."""
    helpers = [site for site in latent.values() if is_auxiliary(site)]
    if isinstance(guide, AutoNormal):  # independent, a helper for each site
        loc = torch.cat([site["fn"].mean.reshape(-1) for site in helpers])
        scale = torch.cat([site["fn"].stddev.reshape(-1) for site in helpers])
        vector = dist.Normal(loc, scale).to_event(1)
    else:
        vector = helpers[0]["fn"]
    u = torch.cat([site["value"].reshape(-1) for site in helpers])
    if not u.shape == vector.event_shape == energy.event_shape:
        return None
    values = energy.constrain(u.to(energy.origin))
    is_same = all(
        torch.allclose(value, latent[name]["value"].to(value), rtol=1e-3, atol=1e-5)
        for name, value in values.items()
    )
    return vector if is_same else None


class _SiteRuns:
    """Draws and log densities of a Pyro guide, by runs of it.

    All at once inside one more plate where the guide is written for that, which is
    checked by doing some draws again; else one by one.
    """

    def __init__(
        self,
        guide: Any,
        trace: Trace,
        energy: PyroModelEnergy,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.guide, self.energy = guide, energy
        self.args, self.kwargs = args, kwargs
        self.nesting = plate_nesting(trace)
        self.event_dims = {
            name: site["fn"].event_dim for name, site in latent_sites(trace).items()
        }
        self.is_vectorized = self._agrees()

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws and their log density (1), shapes ``(count, D)`` and ``(count,)``."""
        if self.is_vectorized:
            values, log_q = self._many(count)
        else:
            runs = [self._run(self.guide) for _ in range(count)]
            log_q = torch.stack([_log_density(run, 1)[0] for run in runs])
            values = {
                name: torch.stack([_value(run, name) for run in runs])
                for name in self.energy.site_shapes
            }
        return self._in_space(values, log_q)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density (1) at ``u`` of shape ``(N, D)``, shape ``(N,)``."""
        values = self.energy.constrain(u)
        if self.is_vectorized:
            log_q = self._many(len(u), values)[1]
        else:
            log_q = torch.stack(
                [
                    self._log_density_at({name: v[n] for name, v in values.items()})
                    for n in range(len(u))
                ]
            )
        return log_q.to(u) + self.energy.log_abs_det(u)  # (1)

    def _in_space(
        self, values: Mapping[str, Tensor], log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values of sites as points ``u``; outside of the support none has a weight."""
        u = self.energy.unconstrain(values).to(**self.energy.tensor_options())
        is_inside = u.isfinite().all(-1)
        u = u.where(is_inside[:, None], 0.0)
        for name, value in self.energy.constrain(u).items():
            given = values[name].to(value)
            is_same = (value - given).abs() <= 1e-4 + 1e-3 * given.abs()
            is_inside &= is_same.reshape(len(u), -1).all(-1)
        log_q = log_q.to(u) + self.energy.log_abs_det(u)  # (1)
        return u, log_q.where(is_inside, torch.inf)

    def _many(
        self, count: int, values: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites, ``(count, *site)``, and log densities, ``(count,)``."""
        plate = pyro.plate("_pyro_ebm_draws", count, dim=-1 - self.nesting)
        guide = self.guide
        if values is not None:
            shaped = {name: self._spread(name, v) for name, v in values.items()}
            guide = poutine.condition(guide, shaped)
        trace = self._run(plate(guide))
        drawn = {
            name: _value(trace, name).reshape(count, *shape)
            for name, shape in self.energy.site_shapes.items()
        }
        return drawn, _log_density(trace, count)

    def _spread(self, name: str, value: Tensor) -> Tensor:
        """With the dimensions of plates that the site is not in."""
        count, *shape = value.shape
        missing = self.nesting - len(shape) + self.event_dims[name]
        return value.reshape(count, *[1] * missing, *shape)

    def _log_density_at(self, values: dict[str, Tensor]) -> Tensor:
        return _log_density(self._run(poutine.condition(self.guide, values)), 1)[0]

    def _run(self, guide: Callable[..., Any]) -> Trace:
        with poutine.block(), WithoutValidation():
            return poutine.trace(guide).get_trace(*self.args, **self.kwargs)

    def _agrees(self) -> bool:
        """Whether many draws at once have the density that they have one by one."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values, log_q = self._many(_NUM_CHECKED)
                again = self._many(_NUM_CHECKED, values)[1]
        except Exception:  # the code may raise anything
            return False
        alone = [
            self._log_density_at({name: v[n] for name, v in values.items()})
            for n in range(_NUM_CHECKED)
        ]
        tolerance = 1e-3 if log_q.dtype == torch.float32 else 1e-6
        return all(
            torch.allclose(
                found, torch.stack(alone).to(found), rtol=tolerance, atol=tolerance
            )
            for found in (log_q, again)
        )


def _value(trace: Trace, name: str) -> Tensor:
    value: Any = trace.nodes[name]["value"]
    return torch.as_tensor(value)


def _log_density(trace: Trace, count: int) -> Tensor:
    """Log density of each draw of a run of a guide, shape ``(count,)``."""
    trace.compute_log_prob()
    terms = [_log_prob(site).reshape(count, -1).sum(-1) for _, site in samples(trace)]
    return torch.stack(terms).sum(0)


def _log_prob(site: Any) -> Tensor:
    """Of a site whose value another model has given; ``-inf`` outside."""
    log_prob: Tensor = site["log_prob"]
    scalar: Any = support_of(site["fn"])
    while isinstance(scalar, constraints.independent):
        scalar = scalar.base_constraint
    if scalar is None or scalar.event_dim:  # simplices and such are not that exact
        return log_prob
    inside = scalar.check(site["value"])
    batch_shape = inside.shape[: inside.dim() - site["fn"].event_dim]
    return log_prob.where(inside.reshape(*batch_shape, -1).all(-1), -torch.inf)
