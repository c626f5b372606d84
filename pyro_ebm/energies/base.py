r"""Base class of all energies.

An energy :math:`f: \mathcal{X} \to \mathbb{R}`, in nats, is half of a distribution

.. math::
    q(x) = \exp(-f(x)) / Z, \qquad Z = \int_{\mathcal{X}} \exp(-f(x'))\, dx'
    \tag{1}

(eq. (1.1) and (1.2) of the text that the library follows); the other half,
:math:`\log Z`, is the business of :mod:`pyro_ebm.partition`.
"""

__all__ = [
    "ClosedForm",
    "Energy",
    "live_or_parameter",
    "require_no_batch",
    "require_precision",
]

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import of_columns
from pyro_ebm.core.validation import expands_to
from pyro_ebm.energies.corrections import shared_support
from pyro_ebm.energies.graphs.recording import is_variable


class ClosedForm(NamedTuple):
    r"""Distribution and :math:`\log Z` of an energy, known without sampling.

    Attributes:
        log_partition: :math:`\log Z` in nats, of the energy's batch shape,
            differentiable in the parameters.
        distribution: The normalised Pyro distribution that equals
            :math:`e^{-f} / Z`, of the same batch shape; it is sampled exactly.

    Exactness: *exact*.

    Example:
        It is what :meth:`Energy.closed_form` returns.

        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> energy.closed_form().log_partition.item()  # log(2 pi)
        1.8379
    """

    log_partition: Tensor
    distribution: dist.TorchDistribution


class Energy(nn.Module):
    r"""An energy function :math:`f(x)` in nats: ``q(x) = exp(-f(x)) / Z``.

    Subclasses define :meth:`forward`. Each call checks the shape of ``x`` and of
    the result, so that an energy that returns ``(..., 1)`` or integers is found at
    its first use.

    One object may hold a batch of energies, as a distribution may: with parameters or
    contexts of a ``batch_shape``, points of shape ``(*sample, *batch, *event)`` have
    energies of shape ``(*sample, *batch)``, and :math:`\log Z` has the batch shape.

    Args:
        event_shape: Shape of one point ``x``.
        support: Constraint with ``event_dim == len(event_shape)``; default: all of
            :math:`\mathbb{R}^{\mathrm{event\_shape}}`. Of vectors with real and
            categorical columns ``constraints.cat([...], dim=-1, lengths=[...])``, see
            :class:`~pyro_ebm.core.MixedSupport`.
        batch_shape: Of the energies that these are; default: one energy.

    Raises:
        TypeError: If ``event_shape`` is a number or ``support`` no constraint.
        ValueError: If the support has another ``event_dim`` than the event.

    Example:
        >>> class DoubleWell(Energy):
        ...     def forward(self, x):
        ...         return (x**2 - 1) ** 2
        >>> DoubleWell(())(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0., 1., 0.])
    """

    batch_shape: torch.Size = torch.Size()
    #: Of the context that :meth:`given` takes; ``None`` if the energy has none.
    context_shape: torch.Size | None = None
    #: Latent sites without a gradient that a Pyro model had sampled before it built the
    #: energy, which may hence depend on them.
    built_after: tuple[str, ...] = ()

    def __init__(
        self,
        event_shape: Sequence[int] | None = None,
        support: Constraint | None = None,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self._init_module()
        if event_shape is None:
            if isinstance(self, PyroModule):  # whose constructor passes no arguments
                return
            raise TypeError(
                f"{type(self).__name__} must call super().__init__(event_shape), got "
                "no event_shape: that of one point, such as (2,), or () for numbers."
            )
        if isinstance(event_shape, int):
            raise TypeError(
                f"event_shape must be a sequence such as ({event_shape},), got the "
                f"number {event_shape}."
            )
        self.event_shape = torch.Size(event_shape)
        self.batch_shape = torch.Size(batch_shape)
        event_dim = len(self.event_shape)
        if support is None:
            support = constraints.independent(constraints.real, event_dim)
        elif not isinstance(support, Constraint):
            raise TypeError(
                f"support must be a constraint, got {support!r}. They are in "
                "pyro.distributions.constraints, such as constraints.positive."
            )
        support = of_columns(support, self.event_shape)
        if support.event_dim != event_dim:
            raise ValueError(
                f"support must have event_dim {event_dim}, the number of dimensions "
                f"of event_shape {tuple(self.event_shape)}; got {support} with "
                f"event_dim {support.event_dim}. Wrap it: "
                f"constraints.independent(support, {event_dim - support.event_dim})."
            )
        self.support = shared_support(support)
        if _PYRO_STACK:
            self.built_after = _latents_without_gradient()

    def _init_module(self) -> None:
        """Initialise the module, and the ``PyroModule`` if it is one as well."""
        this: Any = self
        _require_methods(this.__class__)
        bases = type(self).__mro__
        if "_parameters" in vars(self):  # by the constructor of PyroModule
            return
        is_first = PyroModule in bases and bases.index(PyroModule) < bases.index(Energy)
        if is_first and "_pyro_name" not in vars(self):
            PyroModule.__init__(this)  # comes back here, without an event shape
        else:
            super().__init__()

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one point."""
        return len(self.event_shape)

    def tensor_options(self, like: Tensor | None = None) -> dict[str, Any]:
        """``dtype`` and ``device`` of the floating-point parameters and buffers.

        Args:
            like: Whose options are given where there are none; default: torch's own.

        Example:
            >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
            >>> torch.zeros(3, **energy.tensor_options()).dtype
            torch.float32
        """
        tensors = (t for t in (*self.parameters(), *self.buffers()))
        default = torch.empty(0) if like is None else like
        found = next((t for t in tensors if t.is_floating_point()), default)
        return {"dtype": found.dtype, "device": found.device}

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Energy of each point.

        Args:
            x: Points of shape ``(*sample, *batch, *event)``.

        Returns:
            Energies in nats, shape ``(*sample, *batch)``.
        """

    def __call__(self, x: Tensor) -> Tensor:
        """Energy of each point, with both shapes checked; see :meth:`forward`."""
        batch_shape = self.batch_shape_of(x)
        try:
            energy: Tensor = super().__call__(x)
        except RuntimeError as error:
            own = self.tensor_options(x)["dtype"]
            if "dtype" not in str(error) or x.dtype == own:
                raise
            raise ValueError(
                f"x must have the dtype {own} of the parameters of "
                f"{type(self).__name__}, got {x.dtype}. Convert it: x.to({own}); or "
                f"the energy, by energy.to({x.dtype})."
            ) from error
        if not isinstance(energy, Tensor):
            raise TypeError(
                f"{type(self).__name__} must return a tensor of energies of shape "
                f"{tuple(batch_shape)}, got {type(energy).__name__}. Compute the "
                "energy from x by torch operations."
            )
        if energy.shape != batch_shape or not energy.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} must return one floating-point energy a "
                f"point, shape {tuple(batch_shape)} for x of shape "
                f"{tuple(x.shape)}; got shape {tuple(energy.shape)} and dtype "
                f"{energy.dtype}. A trailing 1 goes away with .squeeze(-1)."
            )
        require_precision(energy, "the values of an energy")
        return energy

    def batch_shape_of(self, x: Tensor) -> torch.Size:
        """Shape of ``x`` without its event, which must be that of the energy.

        Args:
            x: Points of shape ``(*sample, *batch, *event)``.

        Returns:
            ``(*sample, *batch)``.

        Raises:
            ValueError: If ``x`` does not end in the event shape, or has no value for
                each energy of a batch.
        """
        shape = self.shape_without_event(x)
        if self.batch_shape and not expands_to(self.batch_shape, shape):
            raise ValueError(
                f"x must have shape (*sample, *batch, *event) with batch_shape "
                f"{tuple(self.batch_shape)} of {type(self).__name__} and event_shape "
                f"{tuple(self.event_shape)}, got {tuple(x.shape)}. For the same points "
                "in each energy of the batch, expand them."
            )
        return shape

    def shape_without_event(self, x: Tensor) -> torch.Size:
        """The same of points that are still to be expanded to the batch.

        Args:
            x: Points of shape ``(*any, *event)``.

        Returns:
            ``any``.

        Raises:
            ValueError: If ``x`` does not end in the event shape.
        """
        num_dims = x.dim() - self.event_dim
        if num_dims < 0 or x.shape[num_dims:] != self.event_shape:
            raise ValueError(
                f"x must have shape (*batch, {_join(self.event_shape)}) to match the "
                f"event_shape of {type(self).__name__}, got {tuple(x.shape)}. Reshape "
                "the data or build the energy with another event_shape."
            )
        return x.shape[:num_dims]

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Energy and its gradient in ``x`` in one autograd pass.

        Both are detached from the parameters, and correct under ``no_grad`` too.
        Override it where :math:`\nabla f` is known in closed form, and call
        :meth:`batch_shape_of` there: nothing else checks the shape of ``x``.

        Args:
            x: Points of shape ``(*batch, *event)``.

        Returns:
            ``f(x)`` of shape ``(*batch,)`` and the gradient in the shape of ``x``.

        Raises:
            ValueError: If the energy does not depend on ``x`` by differentiable
                operations.
        """
        grad = None
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self(x)
            if energy.requires_grad:
                # Ones instead of a sum: one operation less, forward and backward.
                ones = torch.ones_like(energy)
                (grad,) = torch.autograd.grad(energy, x, ones, allow_unused=True)
        if grad is None:
            raise ValueError(
                f"{type(self).__name__} must have a gradient in x, which chains follow "
                "and so do the walkers that track log Z; it has none: it detaches x, "
                "compares or rounds it. Build it from differentiable operations. What "
                "has values only can be learned by "
                "ObjectiveLoss(energy, NoiseContrastive(noise)), and its log Z is "
                "found by pyro_ebm.partition.importance_sampling."
            )
        return energy.detach(), grad

    def given(self, context: Tensor) -> "Energy":
        """The energy in a context, or in a batch of contexts.

        Args:
            context: Shape ``(*batch, *context)``.

        Returns:
            An energy with the batch shape of the contexts.

        Raises:
            NotImplementedError: If the energy is a function of ``x`` alone.
        """
        raise NotImplementedError(
            f"{type(self).__name__} takes no context. Write the energy as "
            "FunctionEnergy(fn, event_shape, context_shape=...) with fn(x, context)."
        )

    def correction(self, x: Tensor) -> Tensor:
        """The energy without that of its base, which is not learned.

        Args:
            x: Shape ``(*batch, *event)``.

        Returns:
            Shape ``(*batch,)``; the whole energy where there is no such base.
        """
        value: Tensor = self(x)
        return value

    def correct(self, base: dist.TorchDistribution, x: Tensor) -> None:  # noqa: B027
        """Become a correction of a density that was fitted to data, if it can be one.

        Networks without a base do; the others stay as they are.

        Args:
            base: Normalised, over the events of the energy.
            x: Points of it to standardise by, shape ``(N, *event)``.
        """

    def closed_form(self) -> ClosedForm | None:
        r""":math:`\log Z` and the normalised distribution, where they are known.

        Exactness: *exact* where it is not ``None``.
        """
        return None

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: tensors with a graph become numbers."""
        inherited: Any = getattr(super(), "__getstate__", vars(self).copy)()
        buffers = {
            name: value if value is None or value.is_leaf else value.detach()
            for name, value in self._buffers.items()
        }
        return {**inherited, "_buffers": buffers}

    # Operators return subclasses of this very class, so the two constructors are
    # filled in by pyro_ebm.energies.algebra once it has defined them.
    _linear: ClassVar[Callable[..., "Energy"]]
    _exp: ClassVar[Callable[["Energy"], "Energy"]]

    def __add__(self, other: "Energy | float | Tensor") -> "Energy":
        """The sum, whose distribution is the product."""
        return Energy._linear((self, 1.0), (other, 1.0))

    __radd__ = __add__

    def __sub__(self, other: "Energy | float | Tensor") -> "Energy":
        """The difference, whose distribution is the quotient."""
        if isinstance(other, nn.Parameter):
            return -(other - self)  # -1 times a parameter would no longer be learned
        return Energy._linear((self, 1.0), (other, -1.0))

    def __rsub__(self, other: "float | Tensor") -> "Energy":
        """A number minus the energy."""
        return Energy._linear((self, -1.0), (other, 1.0))

    def __mul__(self, other: "float | Tensor") -> "Energy":
        """The multiple, whose distribution is a power."""
        return Energy._linear((self, other))

    __rmul__ = __mul__

    def __neg__(self) -> "Energy":
        """The energy of the reciprocal of the density."""
        return Energy._linear((self, -1.0))

    def exp(self) -> "Energy":
        r"""The energy :math:`\exp(f(x))`, the question of the text's section 1.3."""
        return Energy._exp(self)


def require_no_batch(energy: "Energy", name: str = "energy") -> None:
    """Check that the argument ``name`` is a single energy.

    Raises:
        ValueError: If it is a batch of energies.
    """
    if energy.batch_shape:
        raise ValueError(
            f"{name} must be one energy here, got a batch of shape "
            f"{tuple(energy.batch_shape)}. Take one by "
            "pyro_ebm.energies.select(energy, i); EnergyDistribution(energy) has draws "
            "and log_prob of all of them."
        )


def live_or_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a tensor that an energy was given.

    What carries a graph (a latent variable, ``pyro.param``, the output of a network)
    stays as it is, so that gradients reach it: as a buffer that is not saved; and so
    does every tensor while a Pyro model that builds the energy is traced, where latent
    variables carry none. A ``nn.Parameter`` is shared. Any other tensor is copied into
    a parameter of its own.

    Args:
        module: The energy, after ``super().__init__``.
        name: Of the attribute.
        value: Of floating point.

    Example:
        >>> module, latent = torch.nn.Module(), torch.ones(2, requires_grad=True)
        >>> live_or_parameter(module, "loc", 2 * latent)
        >>> [name for name, _ in module.named_parameters()], module.loc.grad_fn
        ([], <MulBackward0 object at ...>)
    """
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif value.requires_grad or is_variable(value):
        module.register_buffer(name, value, persistent=False)
    else:
        module.register_parameter(name, nn.Parameter(value.detach().clone()))


def require_precision(tensor: Tensor, name: str) -> None:
    """Check that a tensor is not of half precision.

    Raises:
        ValueError: If it is: with three digits there is no log Z and no chain.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} must be of single or double precision, got {tensor.dtype}, which "
            "has three digits. Convert data, parameters and modules with .float(), and "
            "compute without autocast."
        )


def _latents_without_gradient() -> tuple[str, ...]:
    """Latent sites in the runs that are being traced.

    WeighedPredictive puts its draws in by conditioning, so that what a handler has
    conditioned counts as latent; what the model observes itself does not.
    """
    conditioned = [h.data for h in _PYRO_STACK if isinstance(h, ConditionMessenger)]
    traces = [h.trace for h in _PYRO_STACK if isinstance(h, TraceMessenger)]
    sites = {name: site for trace in traces for name, site in trace.nodes.items()}
    return tuple(
        name
        for name, site in sites.items()
        if site["type"] == "sample"
        and not (site["is_observed"] and not any(name in c for c in conditioned))
        and not site_is_subsample(site)
        and not getattr(site["value"], "requires_grad", False)
    )


@functools.cache
def _require_methods(kind: type) -> None:
    """Check that a class is complete, as ``ABC`` does, which PyroModule excludes."""
    missing = [
        name
        for name in dir(kind)
        if getattr(getattr(kind, name, None), "__isabstractmethod__", False)
    ]
    if missing:
        raise TypeError(
            f"{kind.__name__} must define {', '.join(missing)} to be an energy; "
            "forward(self, x) gives the energies, shape (*batch,), of points x of "
            "shape (*batch, *event)."
        )


def _join(shape: torch.Size) -> str:
    return ", ".join(map(str, shape)) if shape else "no event dimensions"
