r"""Runs of a Pyro model: at given values, until a site, and with corrected draws.

Gammas, betas and Dirichlets are drawn in unconstrained space. With a small
concentration most of their mass lies nearer to an edge of the support than a
floating-point number can: of ``Gamma(0.01, 1.0)`` two fifths are below
:math:`10^{-38}`, and torch gives the smallest number for all of them. Their logarithms
are no trouble. With :math:`g \sim \mathrm{Gamma}(a)`,

.. math::
    \log g = \log g' + \log(U) / a, \qquad g' \sim \mathrm{Gamma}(a + 1)     \tag{1}

the logit of a beta is the difference of two of them, and the stick-breaking coordinates
of a Dirichlet are :math:`\log g_k - \log \sum_{j > k} g_j`, up to a constant.
"""

__all__ = [
    "CorrectedDraws",
    "FailuresAreNan",
    "Model",
    "WithoutValidation",
    "initial_value",
    "is_masked",
    "retried",
    "run_model",
    "samples",
]

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to, transform_to
from torch.distributions.transforms import IndependentTransform
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ebm.core.validation import without_validation
from pyro_ebm.energies.corrections import corrected, support_of, without_independent
from pyro_ebm.energies.graphs.recording import LinAlgError

aten = torch.ops.aten
Model = Callable[..., Any]
_T = TypeVar("_T")
#: Runs of a model at random values before an error is taken as final.
_MAX_TRIES = 20


def run_model(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace of a run in which latent values are uniform in unconstrained space.

    Unlike a draw of the prior, it can be had from improper priors too.
    """
    initialized = poutine.trace(InitMessenger(initial_value)(model))
    try:
        return retried(lambda: initialized.get_trace(*args, **kwargs))
    except ValueError as error:
        if "log_factor" not in str(error):
            raise
        names = [name for name, _ in samples(initialized.msngr.trace)]
        where = f"after the site {names[-1]!r}" if names else "before any site"
        raise ValueError(
            f"a pyro.factor {where} is nan at each of {_MAX_TRIES} random values of "
            "the latent sites. See what it takes the logarithm or the root of."
        ) from error


def retried(run: Callable[[], _T]) -> _T:
    """Run a model again if it fails at some values, as at a singular matrix."""
    for attempt in range(_MAX_TRIES):
        try:
            with poutine.block():
                return run()
        except (ValueError, LinAlgError):
            if attempt == _MAX_TRIES - 1:
                raise
    raise AssertionError


def samples(trace: Trace) -> list[tuple[str, Any]]:
    """Names and sample sites of a run, in order, without those of plates."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    ]


def is_masked(site: Any) -> bool:
    """Whether a mask hides a part of a site's density."""
    mask, fn = site["mask"], without_independent(site["fn"])
    is_hidden = mask is not None and not torch.as_tensor(mask).all()
    return is_hidden or isinstance(fn, dist.MaskedDistribution)


@torch.no_grad()
def initial_value(site: dict[str, Any]) -> Tensor:
    """A value of a site, uniform in (-2, 2) in unconstrained space if continuous.

    Raises:
        NotImplementedError: If its support has no bijection from real space.
    """
    fn = site["fn"]
    if fn.has_enumerate_support or fn.support.is_discrete:
        return fn.sample()
    # Pyro's own strategy knows neither improper priors nor the support of a mixture.
    like = torch.empty(0) if isinstance(fn, dist.ImproperUniform) else fn.sample()
    support = support_of(fn)
    try:
        biject_to(support)
        transform = transform_to(support)
    except NotImplementedError:
        raise NotImplementedError(
            f"the support {support} of site {site['name']!r} has no bijection from "
            "real space in torch. Sample parameters that are free to vary and build "
            "the value from them, as dist.LKJCholesky and scales do for a covariance; "
            "of a mixture, give all components the same support."
        ) from None
    shape = _flat_shape(transform, fn.shape())
    value: Tensor = transform(like.new_empty(shape).uniform_(-2, 2))
    return value


def _flat_shape(transform: Any, shape: torch.Size) -> torch.Size:
    """The shape of what a transform maps to one shape."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if not transform.codomain.event_dim:  # to ask torch would load its compiler
        return shape
    return torch.Size(transform.inverse_shape(shape))


class CorrectedDraws(Messenger):
    """Handler that draws from a site's density where torch's own sampler does not.

    Attributes:
        flat: Values in unconstrained space, of sites that were drawn there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flat: dict[str, Tensor] = {}

    def _pyro_sample(self, site: Any) -> None:
        fn = site["fn"] = corrected(site["fn"])
        if site["value"] is not None or site["is_observed"] or not _is_continuous(fn):
            return
        u = _edge_draw(fn)
        if u is not None:
            self.flat[site["name"]] = u
            value = biject_to(fn.support)(u.to(fn.mean.dtype))
            site["value"], site["done"] = value, True


def _is_continuous(fn: Any) -> bool:
    support: Any = getattr(fn, "support", None)
    return support is not None and not support.is_discrete


_FACTORS = {
    aten.linalg_cholesky_ex.default,
    aten.linalg_inv_ex.default,
    aten.linalg_lu_factor_ex.default,
    aten._linalg_solve_ex.default,
}


class FailuresAreNan(TorchDispatchMode):
    """Dispatch mode in which a factorisation that fails gives nan, and no error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten._linalg_check_errors.default:
            return None
        result = func(*args, **(kwargs or {}))
        if func not in _FACTORS:
            return result
        *factors, info = result
        for factor in factors:
            if factor.is_floating_point():
                failed = (info != 0).reshape(
                    info.shape + (1,) * (factor.dim() - info.dim())
                )
                factor.masked_fill_(failed, torch.nan)
        return result


class WithoutValidation(Messenger):
    """Handler that switches off the validation of all distributions of a model.

    Checks look into values, which tracing cannot, and would end a run whose chains
    stray. Pyro's switch does not reach distributions that were expanded before.
    """

    def __enter__(self) -> Any:
        entered = super().__enter__()  # refuses a second time, with nothing switched
        self._switch = without_validation()
        self._switch.__enter__()
        return entered

    def __exit__(self, *error: Any) -> Any:
        self._switch.__exit__(*error)
        return super().__exit__(*error)

    def _pyro_sample(self, site: Any) -> None:
        site["fn"] = _unvalidated(site["fn"])


def _unvalidated(fn: Any) -> Any:
    """Copy of a distribution, and of those that it is made of, without checks."""
    parts = {
        name: _unvalidated(part)
        for name, part in getattr(fn, "__dict__", {}).items()
        if isinstance(part, Distribution)
    }
    if not parts and not getattr(fn, "_validate_args", False):
        return fn
    clone = copy.copy(fn)
    vars(clone).update(parts, _validate_args=False)
    return clone


def _edge_draw(distribution: Any) -> Tensor | None:
    """A draw in the unconstrained space of the support, in double precision.

    Args:
        distribution: Of any kind.

    Returns:
        What ``biject_to(distribution.support)`` maps to a draw, or ``None`` where the
        distribution is no gamma, inverse gamma, beta or Dirichlet.
    """
    distribution = without_independent(distribution)
    if isinstance(distribution, torch.distributions.Gamma):
        return _log_gamma(distribution.concentration) - distribution.rate.double().log()
    if isinstance(distribution, torch.distributions.Beta):
        first = _log_gamma(distribution.concentration1)
        return first - _log_gamma(distribution.concentration0)
    if isinstance(distribution, torch.distributions.Dirichlet):
        return _sticks(_log_gamma(distribution.concentration))
    if isinstance(distribution, dist.InverseGamma):
        log_rate = distribution.rate.double().log()
        return log_rate - _log_gamma(distribution.concentration)
    return None


def _log_gamma(concentration: Tensor) -> Tensor:
    a = concentration.double()
    return torch._standard_gamma(a + 1).log() + torch.rand_like(a).log() / a  # (1)


def _sticks(log_g: Tensor) -> Tensor:
    rest = log_g.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    left = torch.arange(log_g.shape[-1] - 1, 0, -1).to(log_g)  # sticks after each
    return log_g[..., :-1] - rest + left.log()
