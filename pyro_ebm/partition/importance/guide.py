r"""A guide of a Pyro model as a proposal: by runs of both, or over unconstrained space.

.. math::
    \log w_n = \log p(y, z_n) - \log q(z_n), \qquad z_n \sim q                \tag{1}

Log-weights by runs need nothing of the model but that it runs: discrete latent sites,
branches on latent values and code outside of torch are all allowed.

With the bijections :math:`z = T(u)` of :class:`~pyro_ebm.energies.PyroModelEnergy`,

.. math::
    \log q(u) = \log q(z) + \log\left|\det \frac{\partial T}{\partial u}\right| \tag{2}

so that draws are weighed by the energy, a thousand times as fast as by runs of the
model, and mixed with draws of the prior :math:`p_0`, whose weights are then at most
:math:`1 / \alpha` times the likelihood, however narrow the guide is:

.. math::
    w = e^{-f(u)} \big/ \left[(1 - \alpha)\, q(u) + \alpha\, p_0(u)\right]      \tag{3}

References:
    Owen & Zhou (2000), Safe and effective importance sampling, JASA 95, 135-143.
    Hesterberg (1995), Weighted average importance sampling and defensive mixture
    distributions, Technometrics 37, 185-194.
"""

__all__ = [
    "GuideRuns",
    "density_or_run",
    "log_weights",
    "proposal_of",
]

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoNormal
from pyro.infer.importance import vectorized_importance_weights
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.core.spaces import scalar_of
from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.corrections import without_independent
from pyro_ebm.energies.graphs.recording import LinAlgError
from pyro_ebm.energies.pyro_model.runs import WithoutValidation, retried, samples
from pyro_ebm.energies.pyro_model.sites import check_log_partitions
from pyro_ebm.partition.importance.importance import check_proposal, support_of

#: Draws of a vectorised run that are done again one by one.
_NUM_CHECKED = 4


class _Traces(NamedTuple):
    guide: Trace
    model: Trace

    def log_weight(self) -> Tensor:
        difference = self.model.log_prob_sum() - self.guide.log_prob_sum()  # (1)
        return torch.as_tensor(difference)


class GuideRuns:
    """Log-weights (1), one or many at a time.

    Many draws are made at once inside one more plate. Code that is not written for that
    may fail or, worse, give wrong weights without a word; so some draws are done again
    one by one and compared, and where they differ all are done one by one.

    A run that raises ``ValueError`` or ``LinAlgError``, as at a covariance that is not
    positive definite, is a draw of weight zero, and counted.

    Args:
        model: A Pyro model.
        guide: Over its latent sites; ``None`` proposes from the prior.
        args: Arguments of both.
        kwargs: Arguments of both.

    Attributes:
        is_vectorized: Whether many draws are made at once.
        why_not: Why they are not; empty if they are.
        num_failed: Runs that raised, so far.

    Raises:
        ValueError: If guide and model do not have the same latent sites, a plate is
            subsampled, or an energy does not know its log Z.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if guide is None:
            guide = poutine.block(model, hide_types=["observe"])
        self.model, self.guide = model, guide
        self.args, self.kwargs = args, kwargs
        self.num_failed = 0
        self.example = retried(self._trace)
        _check_sites(self.example)
        self.max_plate_nesting = max(map(_plate_nesting, self.example))
        self.why_not = self._problem_with_vectorizing()
        self.is_vectorized = not self.why_not

    def draw(self, count: int) -> Tensor:
        """Log-weights of new draws, shape ``(count,)``."""
        if self.is_vectorized:
            try:
                return self._many(count)[0]
            except (ValueError, LinAlgError):  # one of them: find out which
                pass
        return torch.stack([self._one() for _ in range(count)])

    def _trace(self, values: Trace | None = None) -> _Traces:
        """One draw of the guide, or one with the given values."""
        guide = self.guide if values is None else poutine.replay(self.guide, values)
        guide_trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        model = poutine.replay(self.model, guide_trace)
        model_trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        return _Traces(guide_trace, model_trace)

    def _one(self) -> Tensor:
        """Log-weight of one draw, shape ``()``."""
        try:
            return self._trace().log_weight()
        except (ValueError, LinAlgError):
            self.num_failed += 1
            return torch.tensor(-torch.inf)

    def _many(self, count: int) -> tuple[Tensor, Trace]:
        """Log-weights of many draws, shape ``(count,)``, and the draws."""
        log_weights, _, guide_trace = vectorized_importance_weights(
            self.model,
            self.guide,
            *self.args,
            num_samples=count,
            max_plate_nesting=self.max_plate_nesting,
            **self.kwargs,
        )
        return torch.as_tensor(log_weights).reshape(-1), guide_trace

    def _problem_with_vectorizing(self) -> str:
        """Why it cannot be done, or an empty string."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._compare(*self._many(_NUM_CHECKED))
        except Exception as error:  # the code may raise anything
            return f"{type(error).__name__}: {error}"

    def _compare(self, log_weights: Tensor, draws: Trace) -> str:
        """Where draws differ from what they are one by one, or an empty string."""
        if log_weights.shape != (_NUM_CHECKED,):
            return f"the weights of {_NUM_CHECKED} draws have {len(log_weights)} values"
        for n, log_weight in enumerate(log_weights):
            values = self._pick(draws, n)
            if values is None:
                return "a site has another shape when many draws are made at once"
            expected = self._trace(values).log_weight().to(log_weight)
            tolerance = 1e-3 if log_weight.dtype == torch.float32 else 1e-6
            if not torch.isclose(
                log_weight, expected, rtol=tolerance, atol=tolerance, equal_nan=True
            ):
                return (
                    f"a draw has log-weight {log_weight.item():.6g} among many, and "
                    f"{expected.item():.6g} by itself"
                )
        return ""

    def _pick(self, draws: Trace, n: int) -> Trace | None:
        """Trace of the guide that holds the ``n``-th of many draws."""
        picked = self.example.guide.copy()
        for name, site in _latent_sites(picked).items():
            value: Any = draws.nodes[name]["value"]
            event_dim = site["fn"].event_dim
            axis = value.dim() - event_dim - self.max_plate_nesting - 1
            if axis >= 0 and value.shape[axis] > 1:
                value = value.select(axis, n)
            if value.numel() != site["value"].numel():
                return None
            site["value"] = value.reshape(site["value"].shape)
        return picked


def _latent_sites(trace: Trace) -> dict[str, Any]:
    """The latent sites of a trace by name."""
    nodes = trace.nodes.items()
    return {
        name: site
        for name, site in nodes
        if site["type"] == "sample"
        and not site["is_observed"]
        and type(site["fn"]).__name__ != "_Subsample"
    }


def _is_auxiliary(site: Any) -> bool:
    """Whether a site of a guide only helps, and is none of the model."""
    return bool(site["infer"].get("is_auxiliary"))


def _check_guide(guide: Any, trace: Trace) -> None:
    """Check that a guide has a density: no site of it is a point, no energy bare."""
    check_log_partitions(trace)
    modules = guide.modules() if isinstance(guide, nn.Module) else ()
    sites = _latent_sites(trace).values()
    helpers = [site for site in sites if _is_auxiliary(site)]
    # Behind helpers a Delta carries their density to where the model has its site.
    points = [site["name"] for site in helpers or sites if _is_point(site["fn"])]
    if points or any(isinstance(module, AutoDelta) for module in modules):
        where = f", at the sites {points}" if points else ""
        raise ValueError(
            f"guide must have a density, and {type(guide).__name__} is a point{where}. "
            "Take AutoNormal or AutoMultivariateNormal; of an AutoLaplaceApproximation "
            "its .laplace_approximation(); or no guide at all."
        )


def _is_point(fn: Any) -> bool:
    return isinstance(without_independent(fn), dist.Delta)


def _check_sites(traces: _Traces) -> None:
    """Check that guide and model have the same latent sites, all the data and log Z.

    Raises:
        ValueError: If not.
    """
    guide, model = _latent_sites(traces.guide), _latent_sites(traces.model)
    known = {name for name, site in guide.items() if _is_auxiliary(site)}
    missing, extra = model.keys() - guide.keys(), guide.keys() - model.keys() - known
    if missing or extra:
        raise ValueError(
            "guide must have the latent sites of the model: "
            f"missing are {sorted(missing)}, not in the model are {sorted(extra)}. "
            'Mark a site that only helps with infer={"is_auxiliary": True}.'
        )
    for trace in traces:
        check_log_partitions(trace)
        for name, site in trace.nodes.items():
            for frame in site.get("cond_indep_stack", ()):
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"plate {frame.name!r} around {name!r} must hold all "
                        f"{frame.full_size} rows, got a subsample of {frame.size}, "
                        "whose evidence is biased. Run it without subsample_size."
                    )


def _plate_nesting(trace: Trace) -> int:
    """Dimensions to the left of the events that a trace uses."""
    nesting = 0
    sites: list[Any] = list(trace.nodes.values())
    for site in sites:
        if site["type"] == "sample":
            frames = [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
            batch_shape = getattr(site["fn"], "batch_shape", ())  # a plate has none
            nesting = max(nesting, len(batch_shape), *frames)
    return nesting


#: Share of draws of the prior.
_SHARE = 0.2


class _Proposal(NamedTuple):
    """A normalised density over ``u``.

    Attributes:
        sample: A number ``N`` to draws and their log density, shapes ``(N, D)`` and
            ``(N,)``; ``inf`` is the density of a draw outside of the support.
        log_prob: Points ``(N, D)`` to their log density, ``(N,)``.
    """

    sample: Callable[[int], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor], Tensor]


def density_or_run(
    guide: Any, run: Callable[[Any], Trace]
) -> tuple[Distribution | None, Trace | None]:
    """The distribution that a guide is or returns; else a run of it, checked.

    Args:
        guide: A distribution, a module that is called for one, such as a zuko flow, a
            function that returns one, or a Pyro guide.
        run: Runs a Pyro guide.

    Raises:
        ValueError: If a Pyro guide has no density.
    """
    density = _as_distribution(guide)
    if density is not None:
        return density, None
    trace = run(guide)
    found = trace.nodes["_RETURN"]["value"]
    if isinstance(found, Distribution) and not _latent_sites(trace):
        return found, None
    _check_guide(guide, trace)
    return None, trace


def _as_distribution(guide: Any) -> Distribution | None:
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


def proposal_of(
    guide: Any,
    trace: Trace | None,
    energy: PyroModelEnergy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> _Proposal | None:
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
    latent = _latent_sites(trace)
    own = {name: site for name, site in latent.items() if not _is_auxiliary(site)}
    if own.keys() != energy.site_shapes.keys():
        return None
    if isinstance(guide, AutoContinuous | AutoNormal):
        vector = _vector_of(guide, latent, energy)
        if vector is not None:
            return _of_vector(vector, energy)
    if len(own) < len(latent):
        return None
    runs = _SiteRuns(guide, trace, energy, args, kwargs)
    return _Proposal(runs.sample, runs.log_prob)


def log_weights(
    energy: PyroModelEnergy,
    proposal: _Proposal,
    prior: dist.TorchDistribution,
    count: int,
) -> Tensor:
    """Log-weights (3) of new draws.

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
    return -energy(u) - log_mixture  # (3)


def _of_vector(vector: Any, energy: PyroModelEnergy) -> _Proposal:
    options = energy.tensor_options()

    def log_prob(u: Tensor) -> Tensor:
        value: Tensor = vector.log_prob(u)
        return value.to(u)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        u = vector.sample(torch.Size((count,)))
        return u.to(**options), vector.log_prob(u).to(**options)

    return _Proposal(sample, log_prob)


def _vector_of(
    guide: Any, latent: Mapping[str, Any], energy: PyroModelEnergy
) -> dist.TorchDistribution | None:
    """The density behind an autoguide, if its vector is that of the energy."""
    helpers = [site for site in latent.values() if _is_auxiliary(site)]
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
        self.nesting = _plate_nesting(trace)
        self.event_dims = {
            name: site["fn"].event_dim for name, site in _latent_sites(trace).items()
        }
        self.is_vectorized = self._agrees()

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws and their log density (2), shapes ``(count, D)`` and ``(count,)``."""
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
        """Log density (2) at ``u`` of shape ``(N, D)``, shape ``(N,)``."""
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
        return log_q.to(u) + self.energy.log_abs_det(u)  # (2)

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
        log_q = log_q.to(u) + self.energy.log_abs_det(u)  # (2)
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
    support: Any = support_of(site["fn"])
    scalar: Any = scalar_of(support)
    if scalar is None or scalar.event_dim:  # simplices and such are not that exact
        return log_prob
    inside = scalar.check(site["value"])
    batch_shape = inside.shape[: inside.dim() - site["fn"].event_dim]
    return log_prob.where(inside.reshape(*batch_shape, -1).all(-1), -torch.inf)
