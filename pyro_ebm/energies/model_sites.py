"""The latent sites of a Pyro model, laid end to end in unconstrained space."""

__all__ = ["ModelSites", "find_sites", "run_model", "samples"]

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, transform_to
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.graph_recording import LinAlgError
from pyro_ebm.energies.unconstrained import same_support

Model = Callable[..., Any]
_T = TypeVar("_T")
#: Runs of a model at random values before an error is taken as final.
_MAX_TRIES = 20


class ModelSites(NamedTuple):
    """The continuous latent sites, in the order in which the model samples them.

    Attributes:
        shapes: Shape of each site's value.
        flat_shapes: The same in unconstrained space.
        transforms: From each site's unconstrained to its constrained values.
        potential: Pyro's potential: a dict of unconstrained values to minus the log
            joint density, shape ``()``.
        max_plate_nesting: Dimensions that the plates of the model take.
        example: A vector of zeros like the unconstrained values, shape ``(D,)``.
    """

    shapes: dict[str, torch.Size]
    flat_shapes: dict[str, torch.Size]
    transforms: dict[str, Transform]
    potential: Callable[[dict[str, Tensor]], Tensor]
    max_plate_nesting: int
    example: Tensor

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Each site's part of ``u``: ``(*batch, D)`` to ``(*batch, *flat_shape)``."""
        parts = u.split([shape.numel() for shape in self.flat_shapes.values()], -1)
        return {
            name: part.reshape(u.shape[:-1] + shape)
            for (name, shape), part in zip(self.flat_shapes.items(), parts, strict=True)
        }

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the sites: ``(*batch, D)`` to ``(*batch, *site_shape)``."""
        return {n: self.transforms[n](part) for n, part in self.split(u).items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`constrain`."""
        parts = []
        for name, shape in self.shapes.items():
            if name not in values:
                raise ValueError(
                    f"values must hold every latent site, {list(self.shapes)}; "
                    f"{name!r} is missing."
                )
            value = torch.as_tensor(values[name])
            batch_dim = value.dim() - len(shape)
            if batch_dim < 0 or value.shape[batch_dim:] != shape:
                raise ValueError(
                    f"site {name!r} must have shape (*batch, *{tuple(shape)}), got "
                    f"{tuple(value.shape)}."
                )
            flat = self.transforms[name].inv(value)
            parts.append(flat.reshape(value.shape[:batch_dim] + (-1,)))
        batch_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([p.expand(*batch_shape, p.shape[-1]) for p in parts], -1)

    def log_abs_det(self, u: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Log-volume of :meth:`constrain` at ``u``, shape ``(*batch,)``."""
        total = u.new_zeros(u.shape[:-1])
        for name, part in self.split(u).items():
            volume = self.transforms[name].log_abs_det_jacobian(part, values[name])
            total = total + volume.reshape(*u.shape[:-1], -1).sum(-1)
        return total

    def energy(self, u: Tensor) -> Tensor:
        """Pyro's potential at one ``u`` of shape ``(D,)``, shape ``()``."""
        with poutine.block(), _WithoutValidation():
            return self.potential(self.split(u))


class _WithoutValidation(Messenger):
    """Lets a value outside of the support have a density of zero, or nan, unchecked.

    Checks look into values, which tracing cannot, and would end a run whose chains
    stray. Pyro's switch does not reach distributions that were expanded before.
    """

    def __enter__(self) -> Any:
        self._switch = pyro.validation_enabled(is_validate=False)
        self._switch.__enter__()
        return super().__enter__()

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


def run_model(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace of a run in which latent values are uniform in unconstrained space.

    Unlike a draw of the prior, it can be had from improper priors too.
    """
    initialized = poutine.trace(InitMessenger(_init_site)(model))
    return _retried(lambda: initialized.get_trace(*args, **kwargs))


def _retried(run: Callable[[], _T]) -> _T:
    """Run a model that may fail at some values, as one that factorises a matrix."""
    for attempt in range(_MAX_TRIES):
        try:
            with poutine.block():
                return run()
        except (ValueError, LinAlgError):
            if attempt == _MAX_TRIES - 1:
                raise
    raise AssertionError


def find_sites(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelSites:
    """Run the model a few times, and check that it is one that an energy can hold.

    Raises:
        ValueError: If there is no continuous latent site, the sites differ from run to
            run, or an observed value is nan.
        NotImplementedError: If a discrete site cannot be enumerated, a plate is
            subsampled, or a support depends on other sites.
    """
    first = run_model(model, args, kwargs)
    latent = [name for name, site in samples(first) if not site["is_observed"]]
    for name, site in samples(first):
        _check_site(name, site)
    _check_same(first, run_model(model, args, kwargs))
    nesting = _max_plate_nesting(first)
    # Without initial values Pyro would look for them, 100 runs at most.
    _, potential, transforms, enumerated = _retried(
        lambda: initialize_model(
            model,
            args,
            kwargs,
            max_plate_nesting=nesting,
            init_strategy=_init_site,
            initial_params={},
        )
    )
    _check_supports(first, enumerated)
    if not transforms:
        raise ValueError(
            "model must have at least one continuous latent site; it has "
            + (f"only discrete ones, {latent}." if latent else "none that is latent.")
            + " Leave out the obs of what is to be inferred."
        )
    values = {n: s["value"].detach() for n, s in samples(first) if n in transforms}
    flat = {name: transforms[name](value) for name, value in values.items()}
    example = torch.cat([value.reshape(-1) for value in flat.values()])
    return ModelSites(
        {name: value.shape for name, value in values.items()},
        {name: value.shape for name, value in flat.items()},
        {name: transform.inv for name, transform in transforms.items()},
        potential,
        nesting,
        torch.zeros_like(example),
    )


def samples(trace: Trace) -> list[tuple[str, Any]]:
    """Names and sample sites of a run, in order, without those of plates."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    ]


def _init_site(site: dict[str, Any]) -> Tensor:
    fn = site["fn"]
    if fn.has_enumerate_support or fn.support.is_discrete:
        return fn.sample()
    if isinstance(fn, dist.ImproperUniform):
        transform = transform_to(fn.support)
        return transform(
            torch.empty(transform.inverse_shape(fn.shape())).uniform_(-2, 2)
        )
    return init_to_uniform(site)


def _max_plate_nesting(trace: Trace) -> int:
    dims = [
        frame.dim
        for _, site in samples(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)


def _check_site(name: str, site: dict[str, Any]) -> None:
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise NotImplementedError(
                f"plate {frame.name!r} subsamples {frame.size} of {frame.full_size}; "
                "an energy is that of all the data. Build the plate without "
                "subsample_size and subsample: let the model take the size as an "
                "argument, and give None here."
            )
    if site["is_observed"]:
        value = site["value"]
        if value.is_floating_point() and value.isnan().any() and site["mask"] is None:
            raise ValueError(
                f"obs of site {name!r} must not contain nan, got "
                f"{int(value.isnan().sum())} in {value.numel()} numbers. Drop them, or "
                "fill them with any number of the support and mask them with "
                "poutine.mask."
            )
    elif site["fn"].support.is_discrete:
        if not site["fn"].has_enumerate_support:
            raise NotImplementedError(
                f"site {name!r} is discrete and cannot be enumerated "
                f"({type(site['fn']).__name__}), so it cannot be summed out. Observe "
                "it, replace it by a distribution with finite support, or marginalise "
                "it by hand."
            )
    else:
        _require_bijection(name, site["fn"].support)


def _require_bijection(name: str, support: Constraint) -> None:
    try:
        biject_to(support)
    except NotImplementedError:
        raise NotImplementedError(
            f"the support {support} of site {name!r} has no bijection from real space "
            "in torch. Sample parameters that are free to vary and build the value "
            "from them, as dist.LKJCholesky and scales do for a covariance."
        ) from None


def _check_same(first: Trace, second: Trace) -> None:
    """Check that two runs have the same sites."""
    sites, others = dict(samples(first)), dict(samples(second))
    if list(sites) != list(others):
        only = sorted(set(sites) ^ set(others)) or list(sites)
        raise ValueError(
            f"model must have the same sites at each run; {only} are not in every run "
            "or in another order. Sample them always, and let the values decide by "
            "poutine.mask or torch.where."
        )
    for name, site in sites.items():
        shape, other = site["value"].shape, others[name]["value"].shape
        if shape != other:
            raise ValueError(
                f"site {name!r} must have the same shape at each run, got "
                f"{tuple(shape)} and {tuple(other)}. Sample the largest shape, and "
                "mask what is not used."
            )
    _check_supports(first, second)


def _check_supports(first: Trace, second: Trace) -> None:
    for name, site in samples(first):
        other: Any = second.nodes[name]["fn"]
        if site["is_observed"] or site["fn"].support.is_discrete:
            continue
        if not same_support(site["fn"].support, other.support):
            raise NotImplementedError(
                f"the support of site {name!r} depends on other sites: "
                f"{site['fn'].support}, then {other.support}. Sample a "
                "variable on a fixed support and map it to where it should be: "
                "low + (high - low) * pyro.sample(name, dist.Beta(1.0, 1.0))."
            )
