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
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions import constraints
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.corrections import map_tensors
from pyro_ebm.energies.graphs.precision import wide
from pyro_ebm.energies.graphs.recording import LinAlgError
from pyro_ebm.energies.normalization import unnormalized_part
from pyro_ebm.energies.pyro_model.full_data import with_missing_data
from pyro_ebm.energies.pyro_model.runs import (
    CorrectedDraws,
    FailuresAreNan,
    Model,
    WithoutValidation,
    is_masked,
    samples,
)
from pyro_ebm.energies.pyro_model.sites import ModelSites

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
    latent: Model = _WithoutObserved()(conditioned)
    return latent


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
        # How many are drawn at once; not known before the first draws.
        self._draw_many: Any = None
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
        if num_draws > 1 and self._draw_many is None:
            u = self._found_way(num_draws)
        elif num_draws > 1 and self._draw_many is not False:
            u = self._draw_many(num_draws, has_density=False)[0]
        if u is None:
            u = self._one_by_one(num_draws)
        return u.reshape(shape).to(**self.energy.tensor_options())

    def _found_way(self, num_draws: int) -> Tensor | None:
        """Draws by the first way of many at once whose densities are right."""
        for is_double in (True, False):
            for way in (self._in_plate, self._mapped):
                draw = functools.partial(way, is_double=is_double)
                try:
                    u, log_prob = draw(num_draws)
                except (ValueError, RuntimeError, IndexError):  # not written for that
                    continue
                if log_prob is not None and self._is_right(u, log_prob):
                    self._draw_many = draw
                    return u
        self._draw_many = False
        return None

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
        return _run_until(last, model, self._args, self._kwargs)

    def _in_plate(
        self, num_draws: int, *, is_double: bool, has_density: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Draws, and log densities, of one run inside one more plate."""
        plate = pyro.plate(
            "_pyro_ebm_draws", num_draws, dim=-1 - self._sites.max_plate_nesting
        )
        try:
            with _precision(is_double=is_double):
                trace, flat = self._run(plate(self._model))
        except ValueError:  # a draw may have no distribution after it
            with _without_errors(), _precision(is_double=is_double):
                trace, flat = self._run(plate(self._model))
        values, log_prob = {}, torch.zeros(())
        for name, site in self._known_samples(trace):
            shape = self._sites.shapes[name]
            values[name] = site["value"].reshape((num_draws, *shape))
            if has_density:
                site_log_prob = site["fn"].log_prob(site["value"])
                log_prob = log_prob + site_log_prob.reshape(num_draws, -1).sum(-1)
        flat = {
            name: part.reshape((num_draws, *self._sites.flat_shapes[name]))
            for name, part in flat.items()
        }
        return self._with_density(values, flat, log_prob if has_density else None)

    def _mapped(
        self, num_draws: int, *, is_double: bool, has_density: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The same by ``vmap`` of a run, for models not written for batches."""

        def one(_: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
            with _without_errors(), _precision(is_double=is_double), _NewNoise():
                trace, flat = self._run(self._model)
            sites = self._known_samples(trace)
            values = {name: site["value"] for name, site in sites}
            known = sites if has_density else []
            parts = (site["fn"].log_prob(site["value"]).sum() for _, site in known)
            return values, flat, sum(parts, torch.zeros(()))

        like = torch.zeros(num_draws)
        with warnings.catch_warnings():  # of operations that torch maps in a loop
            warnings.filterwarnings("ignore", "There is a performance drop")
            values, flat, log_prob = torch.func.vmap(one, randomness="different")(like)
        return self._with_density(values, flat, log_prob if has_density else None)

    def _known_samples(self, trace: Trace) -> list[tuple[str, Any]]:
        sites = samples(trace)
        if any(name not in self._sites.shapes for name, _ in sites):
            raise ValueError("a discrete site is summed out in the energy")
        return sites

    def _with_density(
        self,
        values: dict[str, Tensor],
        flat: dict[str, Tensor],
        log_prob: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        u = self._sites.unconstrain(values, flat)
        if log_prob is None:
            return u, None
        return u, log_prob + self._sites.log_abs_det(u, values)

    def _is_right(self, u: Tensor, log_prob: Tensor) -> bool:
        """Whether the density at some draws is that of the energy."""
        # Not far out, where a bijection saturates in single precision only.
        size = u.abs().amax(-1).where(log_prob.isfinite(), torch.inf)
        checked = size.argsort()[: min(_NUM_CHECKED, int(log_prob.isfinite().sum()))]
        options = self.energy.tensor_options()
        expected = -self.energy(u[checked].to(**options)).to(log_prob)
        is_same = torch.allclose(log_prob[checked], expected, rtol=1e-3, atol=1e-3)
        return is_same and len(checked) > 0


def _run_until(
    name: str, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, dict[str, Tensor]]:
    """A run that ends after a site.

    Returns:
        Its trace, and the values of sites that were drawn in unconstrained space.
    """
    tracer = poutine.trace(_StopAfter(name)(model))
    with poutine.block(), CorrectedDraws() as draws, contextlib.suppress(_Stop):
        tracer(*args, **kwargs)
    return tracer.msngr.trace, draws.flat


class _WithoutObserved(Messenger):
    """Hides the observed sites, and their names from the sites of ``pyro.markov``.

    There each site lists those before it, all of which enumeration expects to have met.
    """

    def __enter__(self) -> Any:
        self._hidden: set[str] = set()
        return super().__enter__()

    def _pyro_sample(self, site: Any) -> None:
        if site["is_observed"]:
            self._hidden.add(site["name"])
            site["stop"] = True
        elif "_markov_scope" in site["infer"]:
            scope = site["infer"]["_markov_scope"]
            kept = {name: n for name, n in scope.items() if name not in self._hidden}
            site["infer"] = {**site["infer"], "_markov_scope": Counter(kept)}


class _DoubleDraws(Messenger):
    """Lets the sites of a model draw in double precision."""

    def _pyro_sample(self, site: Any) -> None:
        if not site["is_observed"] and not site["fn"].support.is_discrete:
            site["fn"] = map_tensors(site["fn"], wide)


class _NewNoise(TorchFunctionMode):
    """Lets ``vmap`` draw where torch fills a new tensor with noise in place."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        way = _NOISE.get(getattr(func, "__name__", ""))
        if way is None:
            return func(*args, **kwargs)
        return way(*args, **kwargs)


#: Out of place, what torch's distributions draw in place.
_NOISE: dict[str, Callable[..., Tensor]] = {
    "normal_": lambda x, mean=0, std=1: mean + std * torch.randn_like(x),
    "uniform_": lambda x, low=0, high=1: low + (high - low) * torch.rand_like(x),
    "exponential_": lambda x, rate=1: -torch.log1p(-torch.rand_like(x)) / rate,
    "cauchy_": lambda x, median=0, sigma=1: (
        median + sigma * (math.pi * (torch.rand_like(x) - 0.5)).tan()
    ),
}


def _precision(*, is_double: bool) -> contextlib.AbstractContextManager[Any]:
    return _DoubleDraws() if is_double else contextlib.nullcontext()


@contextlib.contextmanager
def _without_errors() -> Iterator[None]:
    """A draw that has no density gives nan, not an error for all the others."""
    with WithoutValidation(), FailuresAreNan():
        yield


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


class _Stop(Exception):  # noqa: N818
    pass


class _StopAfter(Messenger):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_post_sample(self, site: Any) -> None:
        if site["name"] == self.name:
            raise _Stop
