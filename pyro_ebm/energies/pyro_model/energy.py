r"""A Pyro model as an energy.

With latent sites :math:`z = T(u)`, :math:`T` the bijections from unconstrained space
that Pyro's own HMC uses,

.. math::
    f(u) = -\log p(z, y) - \log\left|\det \frac{\partial T}{\partial u}\right|,
    \qquad Z = \int e^{-f(u)}\, du = p(y)                                   \tag{1}

so :math:`e^{-f} / Z` is the posterior, and :math:`\log Z` the log evidence.
"""

__all__ = ["PyroModelEnergy"]

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, final

import pyro.poutine as poutine
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyro_ebm.core.errors import CompilationWarning, DivergenceError
from pyro_ebm.core.validation import without_validation
from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.graphs.batching import (
    CastFunction,
    LoopedFunction,
    PointFunction,
    TracedFunction,
)
from pyro_ebm.energies.graphs.precision import is_rounded
from pyro_ebm.energies.graphs.recording import UntraceableError, first_line
from pyro_ebm.energies.pyro_model.full_data import with_missing_data
from pyro_ebm.energies.pyro_model.outputs import ModelOutputs, model_outputs
from pyro_ebm.energies.pyro_model.prior import ModelPrior, prior_model
from pyro_ebm.energies.pyro_model.runs import is_masked, run_model, samples
from pyro_ebm.energies.pyro_model.sites import (
    ModelSites,
    check_log_partitions,
    find_sites,
)

#: Points at which the traced energy is compared with Pyro's.
_NUM_CHECKED = 3
#: Differences from Pyro's that are rounding, in those that rounding of the point makes.
_ROUNDING = 30.0
#: Points that these are chosen from, as not all need be finite.
_NUM_DRAWN = 24
#: Draws of a starting point before giving up.
_MAX_STARTS = 100


@final
class PyroModelEnergy(Energy):
    r"""The energy (1) of a Pyro model, for many chains at once.

    Points are vectors: the unconstrained values of the continuous latent sites, end to
    end in the order of the model. Discrete latent sites are summed out, as in Pyro's
    own HMC.

    The model is run a few times when the energy is built, once of them under a tracer;
    no effect handler runs afterwards. Operators that a loop of the model repeats are
    applied at once, and chains of discrete sites are summed by matrix products. A
    number of chains that comes several times gets a graph of its own. Measured on one
    core for eight schools: value and gradient at 1,024 points take about a third of the
    time that Pyro's potential takes at one, compiled a tenth. What was traced is
    compared with Pyro's potential at a few points.

    Parameters stay live: those of modules and of Pyro's parameter store are read at
    each evaluation, and :meth:`forward` gives them gradients; so do the buffers and
    modes of modules. Everything else is fixed as it was when the energy was built: the
    arguments and their shapes, bounds of supports, tensors in closures, plain numbers,
    and what left torch by ``.tolist()`` or ``.numpy()``. A model that is a module, or a
    method of one, brings its parameters with it; others stay where they are, and
    ``.to()`` moves the arguments but no closure.

    Missing data by ``obs_mask`` are latent. The coordinates of the rows that are
    observed are not used, and follow the density that the missing ones have, so that
    the evidence is that of the observed rows.

    Plates that subsample are given all their rows, a part after another: as many runs
    of the model as there are parts, traced into one graph.

    A model that no fixed sequence of operators computes, as it branches on latent
    values or makes numbers of them by ``.item()``, is evaluated by Pyro, a chain at a
    time; a :class:`~pyro_ebm.core.errors.CompilationWarning` says so.

    Args:
        model: A Pyro model, whose data are given by ``obs``, factors or conditioning.
        *args: Its arguments.
        compile: Whether torch's inductor compiles value and gradient, in some seconds
            for each number of chains. :class:`~pyro_ebm.energies.CompiledEnergy` round
            the energy compiles the leapfrog step of a kernel besides. (A model with an
            argument of this name is given by ``functools.partial``.)
        **kwargs: Its arguments.

    Raises:
        TypeError: If ``model`` cannot be called.
        ValueError: If the model has no continuous latent site, other sites at each run,
            random numbers that are no sites, nan in its data, or the same data for all
            parts of a plate.
        NotImplementedError: If a discrete site cannot be enumerated, a support depends
            on other sites, or a plate that subsamples has latent rows, over 1,000
            parts, or rows that were chosen outside of the model.

    Exactness: *exact*; :math:`Z` of (1) is the evidence.

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> energy = PyroModelEnergy(model, torch.tensor([0.5, -1.0, 0.3]))
        >>> u = energy.initial_points(1000)
        >>> value, grad = energy.value_and_grad(u)
        >>> value.shape, grad.shape, energy.constrain(u)["scale"].shape
        (torch.Size([1000]), torch.Size([1000, 1]), torch.Size([1000]))
    """

    origin: Tensor  # zeros, in the shape, dtype and device of one point

    def __init__(
        self,
        model: Callable[..., Any],
        /,
        *args: Any,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, Energy) or not callable(model):
            raise TypeError(
                f"model must be a Pyro model, got {type(model).__name__}. An energy "
                'becomes one as lambda: pyro.sample("x", EnergyDistribution(energy)).'
            )
        _check_arguments(model, args, kwargs)
        sites = _inspect(model, args, kwargs)
        super().__init__(sites.example.shape)
        self.register_buffer("origin", sites.example, persistent=False)
        self.model = model
        owner = _owner(model)
        self.owner = None if owner is model else owner  # one of them is a submodule
        self._args, self._kwargs = args, kwargs
        self._compile = compile
        self._own_dtype: torch.dtype | None = None  # if not the points'
        self._build(sites)

    def _build(self, sites: ModelSites) -> None:
        self._sites = sites
        self._prior: ModelPrior | None = None
        origin = self.origin.to(self._own_dtype or self.origin.dtype)
        self._function: PointFunction = self._traced(origin)
        if self._own_dtype is not None:
            self._function = _in_double(self._function, origin)

    def in_double(self) -> "PyroModelEnergy":
        """The same energy over points of double precision; itself if it is that.

        The graph of the model is converted, which needs no run of the model; parameters
        stay those of this energy, and live. Where that goes wrong, points and values
        are, and the model is evaluated in its own precision.
        """
        function = _in_double(self._function, self.origin)
        if function is self._function:
            return self
        new = PyroModelEnergy.__new__(PyroModelEnergy)
        vars(new).update(vars(self))
        new._buffers = {**self._buffers, "origin": self.origin.double()}
        new._own_dtype, new._function = self.origin.dtype, function
        if self._prior is not None:
            energy: Any = self._prior.energy
            new._prior = self._prior.with_energy(energy.in_double())
        return new

    def _traced(self, origin: Tensor) -> TracedFunction | LoopedFunction:
        owner = _owner(self.model)
        traced = TracedFunction(self._sites.energy, owner, compile=self._compile)
        looped = LoopedFunction(self._sites.energy)
        try:
            with torch.random.fork_rng(devices=[]):
                _check(traced, looped, origin)
        except UntraceableError as error:
            reason = first_line(error)  # Pyro adds a table of its sites
            warnings.warn(
                f"the model cannot be traced: {reason}. It is evaluated by Pyro, one "
                "chain at a time, which is slow; for a few chains "
                "pyro.infer.NUTS(model) serves as well.",
                CompilationWarning,
                stacklevel=4,
            )
            _check_deterministic(looped, origin)
            return looped
        return traced

    def tensor_options(self, like: Tensor | None = None) -> dict[str, Any]:
        """``dtype`` and ``device`` of a point."""
        return {"dtype": self.origin.dtype, "device": self.origin.device}

    @property
    def is_traced(self) -> bool:
        """Whether evaluations run a traced graph; if not, Pyro runs the model."""
        function = self._function
        if isinstance(function, CastFunction):
            function = function.function
        return isinstance(function, TracedFunction)

    @property
    def site_shapes(self) -> dict[str, torch.Size]:
        """Shape of the value of each continuous latent site, in order."""
        return dict(self._sites.shapes)

    def forward(self, u: Tensor) -> Tensor:
        """Evaluate (1) at ``u`` of shape ``(*batch, D)``."""
        batch_shape = self.batch_shape_of(u)
        flat = u.reshape(-1, *self.event_shape)
        if not flat.shape[0]:
            return u.sum(-1)
        return self._function.value(flat).reshape(batch_shape).to(u.dtype)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient at ``u`` of shape ``(*batch, D)``, by one graph."""
        batch_shape = self.batch_shape_of(u)
        flat = u.detach().reshape(-1, *self.event_shape)
        if not flat.shape[0]:
            return flat.sum(-1).reshape(batch_shape), torch.zeros_like(u)
        value, grad = self._function.value_and_grad(flat)
        return value.reshape(batch_shape).to(u.dtype), grad.reshape(u.shape)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites.

        Args:
            u: Shape ``(*batch, D)``.

        Returns:
            The value of each site, shape ``(*batch, *site_shape)``.
        """
        self.batch_shape_of(u)
        return self._sites.constrain(u)

    @property
    def is_constrained(self) -> bool:
        """Whether a latent site has another support than all real numbers."""
        values = self.constrain(torch.ones_like(self.origin)).values()
        return any(bool((value != 1).any()) for value in values)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`constrain`.

        Args:
            values: A value of shape ``(*batch, *site_shape)`` for each latent site.

        Returns:
            Shape ``(*batch, D)``.

        Raises:
            ValueError: If a site is missing or has another shape.
        """
        return self._sites.unconstrain(values)

    def log_abs_det(self, u: Tensor) -> Tensor:
        """Log-volume of :meth:`constrain` at ``u`` of shape ``(*batch, D)``."""
        return self._sites.log_abs_det(u, self.constrain(u))

    @torch.no_grad()
    def initial_points(self, num_chains: int) -> Tensor:
        """Starting points: uniform in (-2, 2), where energy and gradient are finite.

        Args:
            num_chains: How many. If that many were not found, some come repeatedly.

        Returns:
            Shape ``(num_chains, D)``.

        Raises:
            DivergenceError: If 100 draws of that many points found none.
        """
        found = self.origin.new_empty(0, *self.event_shape)
        for _ in range(_MAX_STARTS):
            u = self.origin.new_empty(num_chains, *self.event_shape).uniform_(-2, 2)
            value, grad = self.value_and_grad(u)
            is_finite = (value + grad.sum(-1)).isfinite()
            found = torch.cat([found, u[is_finite]])
            if len(found) >= num_chains:
                return found[:num_chains]
        if not len(found):
            raise DivergenceError(self._why_not_finite(u[0]))
        again = torch.randint(len(found), (num_chains - len(found),))
        return torch.cat([found, found[again.to(found.device)]])

    def _why_not_finite(self, u: Tensor) -> str:
        with without_validation(), poutine.block():
            values = self.constrain(u.to(self._own_dtype or u.dtype))
            model = poutine.condition(with_missing_data(self.model), values)
            trace = poutine.trace(model).get_trace(*self._args, **self._kwargs)
            trace.compute_log_prob()
        terms = {name: site["log_prob_sum"].item() for name, site in samples(trace)}
        wrong = {n: v for n, v in terms.items() if not math.isfinite(v)}
        grads = self._sites.split(self.value_and_grad(u)[1])
        steep = [name for name, grad in grads.items() if not grad.isfinite().all()]
        return (
            f"no starting point has a finite energy and gradient in {_MAX_STARTS} "
            "draws from (-2, 2), in unconstrained space. At the last, log_prob is not "
            f"finite at the sites {wrong} of {list(terms)}, nor the gradient in "
            f"{steep}. Look for data outside of the support of their distribution, "
            "scales that are 0 or overflow, and values behind a mask that are not "
            "finite."
        )

    @property
    def prior(self) -> ModelPrior:
        """The density of the latent sites alone, over the same ``u``.

        A normalised Pyro distribution without the observed sites and factors, to start
        the path to the posterior from.

        Raises:
            NotImplementedError: If it is not normalised: a latent site is improper,
                masked or scaled.
        """
        if self._prior is None:
            model = prior_model(self.model, self.run())
            energy = self.of_model(model)
            self._prior = ModelPrior(
                energy, model, self._args, self._kwargs, self._sites
            )
        return self._prior

    def outputs(self, values: Mapping[str, Tensor]) -> ModelOutputs:
        """Deterministic sites and log-likelihoods at draws of the latent sites.

        Args:
            values: A value of shape ``(N, *site_shape)`` for each latent site.

        Returns:
            Those at each draw, and the observed data. Only the data where the model has
            discrete latent sites or plates that subsample.
        """
        return model_outputs(self.model, self._args, self._kwargs, values)

    def check_evidence(self) -> None:
        r"""Check that :math:`\log Z` is the log evidence of the model.

        Raises:
            ValueError: If an energy at one of its sites does not know its log Z, or a
                discrete site that is summed out is masked.
        """
        trace = self.run()
        check_log_partitions(trace)
        _check_sums(trace)

    def run(self) -> Trace:
        """Trace of a run at latent values that are uniform in unconstrained space."""
        with torch.random.fork_rng(devices=[]):
            model = with_missing_data(self.model)
            return run_model(model, self._args, self._kwargs)

    def run_under_handlers(self) -> None:
        """Run the model as it is, inside of the caller's effect handlers."""
        with_missing_data(self.model)(*self._args, **self._kwargs)

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Each site's part of ``u``: ``(*batch, D)`` to ``(*batch, *flat_shape)``."""
        return self._sites.split(u)

    @property
    def model_dtype(self) -> torch.dtype:
        """Of the values of the sites in the model itself."""
        return self._own_dtype or self.origin.dtype

    def of_model(self, model: Callable[..., Any]) -> "PyroModelEnergy":
        """The energy of a variant of the model, at the same arguments and precision."""
        energy = PyroModelEnergy(
            model, *self._args, compile=self._compile, **self._kwargs
        )
        # .to() may have changed type and device.
        energy.origin = energy.origin.to(self.origin.device, self.model_dtype)
        return energy if self._own_dtype is None else energy.in_double()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Energy":  # noqa: FBT001, FBT002
        # nn.Module moves parameters and buffers only; the data go with them.
        super()._apply(fn, recurse)
        self._args, self._kwargs = tree_map_only(Tensor, fn, (self._args, self._kwargs))
        self._build(_inspect(self.model, self._args, self._kwargs))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without graphs, which belong to this very model; they are traced anew."""
        derived = ("_sites", "_prior", "_function")
        return {k: v for k, v in vars(self).items() if k not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build(_inspect(self.model, self._args, self._kwargs))


def _check_sums(trace: Trace) -> None:
    """Check that no mask is on a discrete site that is summed out.

    Where the mask is False each value of the site counts for one: a constant in a
    posterior, an error in an evidence.

    Raises:
        ValueError: If there is such a mask.
    """
    for name, site in samples(trace):
        is_summed = not site["is_observed"] and site["fn"].support.is_discrete
        if is_summed and is_masked(site):
            raise ValueError(
                f"site {name!r} must not be masked for an evidence: it is discrete, "
                "and where its mask is False each of its values counts for one. Leave "
                "the masked rows out of the model, say by obs_mask which of its data "
                "are missing, or take pyro_ebm.partition.evidence, which does."
            )


def _in_double(function: PointFunction, origin: Tensor) -> PointFunction:
    """A function of points like ``origin``, in double precision."""
    if isinstance(function, CastFunction):
        return function
    narrow = CastFunction(function, origin.dtype)
    if isinstance(function, TracedFunction):
        with torch.random.fork_rng(devices=[]):
            u = origin.new_empty((_NUM_DRAWN, *origin.shape)).uniform_(-2, 2).double()
        try:
            wide = function.in_double(origin)
            if wide is function or is_rounded(
                narrow.value_and_grad(u), wide.value_and_grad(u)
            ):
                return wide
        except RuntimeError:  # an operator that refuses the other type
            pass
    return function if origin.dtype is torch.float64 else narrow


def _check_deterministic(function: LoopedFunction, origin: Tensor) -> None:
    """Check that the energy is the same twice.

    Raises:
        ValueError: If it is not.
    """
    with torch.random.fork_rng(devices=[]):
        u = origin.new_empty((2, *origin.shape)).uniform_(-2, 2)
        first, second = (function.value_and_grad(u)[0] for _ in range(2))
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise ValueError(
            "model must give the same density for the same values; it gave log "
            f"densities {(-first).tolist()} and then {(-second).tolist()}. It draws "
            "random numbers that are no sample site: put a module with dropout into "
            "eval mode, and choose rows by pyro.plate."
        )


def _check_arguments(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        signature = inspect.signature(model)
    except ValueError:  # not known of some callables
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"model cannot be called with the arguments that it was given: {error}. "
            "Bind them, functools.partial(model, *args). An energy f(x) is no model: "
            "wrap it as pyro_ebm.energies.FunctionEnergy(fn, event_shape)."
        ) from None


def _owner(model: Any) -> nn.Module | None:
    """The module that a model is, or is a method of."""
    while isinstance(model, functools.partial):
        model = model.func
    owner = getattr(model, "__self__", model)
    return owner if isinstance(owner, nn.Module) else None


def _inspect(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelSites:
    with torch.random.fork_rng(devices=[]):  # building must not move the stream
        return find_sites(model, args, kwargs)


def _check(traced: TracedFunction, looped: LoopedFunction, origin: Tensor) -> None:
    """Compare the traced energy with Pyro's at a few points.

    Raises:
        UntraceableError: If they differ.
    """
    for _ in range(_MAX_STARTS):
        u = origin.new_empty((_NUM_DRAWN, *origin.shape)).uniform_(-2, 2)
        mine = traced.value_and_grad(u)
        is_finite = mine[0].isfinite() & mine[1].isfinite().all(-1)
        if is_finite.any():
            break
    num_compared = 0
    for index in is_finite.nonzero().squeeze(-1):
        theirs = looped.value_and_grad(u[index].unsqueeze(0))
        if not all(bool(part.isfinite().all()) for part in theirs):
            continue  # rounding may decide that, as at a nearly singular matrix
        # What rounding of the point does to Pyro's, it may do to the difference.
        nearby = looped.value_and_grad(_next_to(u[index]).unsqueeze(0))
        for part, wanted, near in zip(mine, theirs, nearby, strict=True):
            noise = (near - wanted).abs().max().nan_to_num(torch.inf)
            _require_close(part[index], wanted[0], _ROUNDING * noise.item())
        num_compared += 1
        if num_compared == _NUM_CHECKED:
            return
    if is_finite.any() and not num_compared:
        raise UntraceableError("Pyro's potential is finite nowhere, what is traced is")


def _next_to(u: Tensor) -> Tensor:
    return u * (1 + 4 * torch.finfo(u.dtype).eps)


def _require_close(mine: Tensor, theirs: Tensor, noise: float) -> None:
    tolerance = max(1e-5, 1e3 * torch.finfo(theirs.dtype).eps)
    difference = (mine - theirs).abs().max()
    if not difference <= tolerance * (1 + theirs.abs().max()) + noise:
        raise UntraceableError(
            f"the traced energy differs from Pyro's potential, by {difference:.3g};"
            " it seems to depend on something else than values and parameters"
        )
