r"""An energy as a Pyro distribution.

.. math::
    \log q(x) = -f(x) - \log Z                                              \tag{1}
"""

__all__ = ["EnergyDistribution", "leaves"]

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.verdict import Status
from pyro_ebm.distributions.operators import Factor
from pyro_ebm.distributions.pool import draw, last_diagnostics
from pyro_ebm.distributions.representation import distribution_html, log_partition_text
from pyro_ebm.energies import ClosedForm, Energy, PyroModelEnergy
from pyro_ebm.energies.discrete.exact.distribution import can_be_enumerated, enumerated
from pyro_ebm.mcmc import IndependentChains, Sampler, SamplingDiagnostics
from pyro_ebm.partition import LogPartitionEstimate


class EnergyDistribution(Factor, dist.TorchDistribution):
    r"""The distribution :math:`q(x) = e^{-f(x)} / Z` at a ``pyro.sample`` site.

    It is a throw-away view: parameters live in the energy, and :math:`\log Z` with its
    error in :class:`~pyro_ebm.distributions.EnergyModel`. ``log_prob`` is a pure
    function; where an energy is learned, an :class:`~pyro_ebm.EnergyModel` or
    :class:`pyro_ebm.infer.Learn` supplies the gradient of :math:`\log Z`.

    Args:
        energy: The energy :math:`f`.
        log_partition: :math:`\log Z` in nats: a number, a scalar tensor, an estimate of
            :mod:`pyro_ebm.partition`, or ``None`` for that of the energy's closed form.
            Without one it is unknown, counts as 0, and ``is_normalized`` is false.
        sampler: How to draw; default: one HMC chain a draw, or exactly where the energy
            has a closed form.
        validate_args: Whether ``log_prob`` checks its argument; Pyro's default.

    Raises:
        TypeError: If ``energy`` is no :class:`~pyro_ebm.energies.Energy`.
        ValueError: If ``log_partition`` is not one number, or an estimate says that
            there is no partition function.
        NotImplementedError: If a parameter of the energy is a random variable.

    Exactness: ``log_prob`` is *exact* given an exact ``log_partition``, *unnormalised*
    without one; ``sample`` is *consistent* in the sampler's number of steps.

    Example:
        >>> energy = pyro_ebm.energies.FunctionEnergy(lambda x: x**2 / 2, ())
        >>> q = EnergyDistribution(energy, log_partition=0.9189385)
        >>> q.log_prob(torch.tensor(0.0)).item()
        -0.9189385
        >>> EnergyDistribution(energy).is_normalized
        False
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        energy: Energy,
        log_partition: "float | Tensor | LogPartitionEstimate | None" = None,
        *,
        sampler: Sampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(energy, Energy):
            raise TypeError(
                f"energy must be an Energy, got {type(energy).__name__}. Wrap a "
                "callable: pyro_ebm.energies.FunctionEnergy(fn, event_shape)."
            )
        _bind_parameters(energy)
        known = energy.closed_form() if log_partition is None else None
        if known is not None:  # with its gradient
            log_partition = known.log_partition
        self.energy = energy
        #: Gives a tensor of value zero with the gradient of log Z; of EnergyModel.
        self._gradient: Callable[[], Tensor] | None = None
        self.log_partition = _as_scalar(log_partition, energy)
        #: Standard error of ``log_partition`` in nats; 0 where none was given.
        self.log_partition_std_error: float | Tensor = 0.0
        if isinstance(log_partition, LogPartitionEstimate):
            self.log_partition_std_error = log_partition.std_error
        self.is_normalized = log_partition is not None and (
            not isinstance(log_partition, LogPartitionEstimate)
            or log_partition.is_reliable
        )
        self.sampler = sampler
        # The module that keeps parameters and chains, set by EnergyModel.
        self.owner: Any = None
        super().__init__(torch.Size(), energy.event_shape, validate_args=validate_args)

    @property
    def log_partition(self) -> Tensor:
        r""":math:`\log Z` in nats, shape ``()``.

        Of an :class:`~pyro_ebm.EnergyModel` in ``train()`` it has the gradient
        :math:`-\mathbb{E}_q[\partial f]` while gradients are on.
        """
        if self._gradient is None or not torch.is_grad_enabled():
            return self._log_partition
        return self._log_partition + self._gradient()

    @log_partition.setter
    def log_partition(self, value: Tensor) -> None:
        self._log_partition, self._gradient = value, None

    @property
    def support(self) -> constraints.Constraint:
        """The support of the energy."""
        return self.energy.support

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are at most 4096 states, for Pyro to sum over."""
        return can_be_enumerated(self)

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        """All states of a finite support, shape ``(N, *batch, *event)``.

        Args:
            expand: Whether along the batch; else it has ones there.

        Raises:
            NotImplementedError: If there are more than 4096, or infinitely many.
        """
        like = torch.empty(0, **self.energy.tensor_options())
        return enumerated(self, like, expand=expand)

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "EnergyDistribution":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def unnormalized_log_prob(self, x: Tensor) -> Tensor:
        """Minus the energy.

        Args:
            x: Shape broadcastable to ``(*sample, *batch, *event)``.

        Returns:
            Shape ``(*sample, *batch)``.

        Exactness: *unnormalised*.
        """
        return -self.energy(self._expanded(x))

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Evaluate (1).

        Args:
            x: Shape broadcastable to ``(*sample, *batch, *event)``.

        Returns:
            Shape ``(*sample, *batch)``, in nats.

        Raises:
            ValueError: If ``x`` is outside the support, or if ``log_partition`` is a
                free parameter: the likelihood is then unbounded.
            NotImplementedError: If the energy depends on a latent variable while
                ``log_partition`` does not.
        """
        self.require_no_free_log_partition()
        x = self._expanded(x)
        value = -self.energy(x)
        log_partition = self.log_partition
        # The gradient of a model is that in its own parameters.
        is_blind = self._gradient is not None or not log_partition.requires_grad
        if value.requires_grad and is_blind:
            self._require_no_latent_energy(value, x)
        return value - log_partition  # (1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, one chain each, with no gradient.

        Fewer draws than the chains that are run at least, 32 by default, come from a
        pool, from which each is taken once, for all distributions of the same energy:
        one draw at a time costs no more than many at once. The pool is dropped when
        the energy changes and when torch's seed is set anew.

        Chains that take more than three seconds show a progress bar; the sampler
        ``IndependentChains(base, progress_bar=False)`` shows none.

        Args:
            sample_shape: Shape of the draws.

        Returns:
            Shape ``(*sample, *batch, *event)``. Within Pyro's search for initial
            values, which throws draws away, the chains' starting points.

        Warns:
            UnreliableWarning: If the chains have not converged, once as long as the
                energy stands; see :meth:`sampling_diagnostics`.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        num_draws = math.prod(shape[: len(shape) - len(self.event_shape)])
        closed_form = self.closed_form() if self.sampler is None else None
        # Inference mode cannot be left by enable_grad, as chains need.
        with torch.inference_mode(mode=False), torch.no_grad():
            if closed_form is not None:
                draws = closed_form.distribution.sample(torch.Size([num_draws]))
            elif any(isinstance(handler, InitMessenger) for handler in _PYRO_STACK):
                draws = self._sampler.start(self.energy, num_draws)
            else:
                draws = draw(self.energy, self._sampler, num_draws)
        return draws.reshape(shape)

    def sampling_diagnostics(self) -> SamplingDiagnostics:
        """How the last draws of :meth:`sample` were made, and how good they are.

        Returns:
            ``"exact"`` by a closed form; by chains their R-hat and a verdict.

        Raises:
            RuntimeError: If nothing was drawn since the energy changed.

        Example:
            >>> energy = pyro_ebm.energies.FunctionEnergy(lambda x: x**4, ())
            >>> q = EnergyDistribution(energy)
            >>> x = q.sample()
            >>> q.sampling_diagnostics().status
            'ok'
        """
        if self.sampler is None and self.closed_form() is not None:
            return SamplingDiagnostics("closed form", Status.EXACT)
        with torch.inference_mode(mode=False):
            found = last_diagnostics(self.energy, self._sampler)
        if found is None:
            raise RuntimeError(
                "there are no draws of the energy as it is now: call sample first."
            )
        return found

    def closed_form(self) -> ClosedForm | None:
        """What is known of the energy without sampling, or ``None``."""
        return self.energy.closed_form()

    # Filled in by pyro_ebm.distributions.conditional, which builds on this class.
    _condition: ClassVar[Callable[..., "EnergyDistribution"]]

    def condition(self, observed: Any, **settings: Any) -> "EnergyDistribution":
        """The distribution of the rest of the event, given a part of it.

        Args:
            observed: Indices and values, such as ``{0: 1.0}``.
            **settings: See :class:`~pyro_ebm.distributions.Conditional`.
        """
        return EnergyDistribution._condition(self, observed, **settings)

    def to_event(
        self, reinterpreted_batch_ndims: int | None = None
    ) -> "EnergyDistribution | dist.Independent":
        """See ``TorchDistribution.to_event``."""
        if reinterpreted_batch_ndims is None:
            reinterpreted_batch_ndims = len(self.batch_shape)
        return _IndependentEnergies(self, reinterpreted_batch_ndims)

    def mask(self, mask: "bool | Tensor") -> dist.TorchDistribution:
        """See ``TorchDistribution.mask``."""
        return self if mask is True else super().mask(mask)

    def score_parts(self, *args: Any, **kwargs: Any) -> Any:
        r"""Pyro asks for them where a distribution stands in a guide.

        Raises:
            NotImplementedError: If ``log_partition`` is not that of a closed form.
        """
        self.require_fit_for_guide()
        return super().score_parts(*args, **kwargs)

    def require_fit_for_guide(self) -> None:
        r"""Refuse a :math:`\log Z` that is unknown, or lacks its gradient.

        Raises:
            NotImplementedError: If ``log_partition`` is not that of a closed form.
        """
        known = self.closed_form()
        if known is None:
            raise NotImplementedError(
                f"{self} stands in a guide, where its log_prob must be normalised with "
                "a gradient, and its log Z has no closed form. Use a normalised guide "
                "(an AutoGuide, a flow), or put the energy in the model."
            )
        exact = known.log_partition
        needs_gradient = torch.is_grad_enabled() and exact.requires_grad
        if not torch.allclose(self.log_partition, exact) or (
            needs_gradient and not self.log_partition.requires_grad
        ):
            raise NotImplementedError(
                f"{self} stands in a guide, where its log_prob must be normalised with "
                f"a gradient; log_partition is {self.log_partition.item():.6g}, the "
                f"closed form is {exact.item():.6g}. Build the distribution by an "
                "EnergyModel, or leave log_partition=None."
            )

    def require_no_free_log_partition(self) -> None:
        r"""Refuse a learnable :math:`\log Z` that no bound or contrast holds.

        Raises:
            ValueError: If ``log_partition`` is a leaf that requires a gradient.
        """
        free = self._log_partition
        if torch.is_grad_enabled() and free.requires_grad and free.is_leaf:
            raise ValueError(
                "log_partition is a free parameter (requires_grad=True), and the plain "
                "likelihood -f(x) - log_partition grows without bound as it falls. Let "
                "EnergyModel track it, or give log_partition.detach() if it is known."
            )

    def _require_no_latent_energy(self, value: Tensor, x: Tensor) -> None:
        """Refuse a value that depends on anything but ``x`` and parameters."""
        own = {id(p) for p in self.energy.parameters() if p.requires_grad}
        foreign = [leaf for leaf in leaves(value, x) if id(leaf) not in own]
        store = pyro.get_param_store()
        latent = any(
            not isinstance(leaf, nn.Parameter) and store.param_name(leaf) is None
            for leaf in foreign
        )
        # Behind a parameter there may be a guide, hence a latent variable, or only a
        # module that a closure has hidden: the two look the same.
        suspect = foreign and not own and not x.requires_grad
        if not latent and not suspect:
            return
        raise NotImplementedError(
            f"the energy of {self} depends on a variable outside of it that requires a "
            "gradient, and log Z then depends on that variable too: the posterior is "
            "doubly intractable. Give a log_partition that is a function of the "
            "variable, exact or amortised, or learn the energy's own parameters by "
            "an EnergyModel or pyro_ebm.infer.Learn. If it is a module or parameter "
            "that a closure hides, hand the module to FunctionEnergy as fn, or detach "
            "it. (To evaluate only: torch.no_grad().)"
        )

    @property
    def _sampler(self) -> Sampler:
        return IndependentChains() if self.sampler is None else self.sampler

    def _expanded(self, x: Tensor) -> Tensor:
        """The points, checked, in the shape ``(*sample, *batch, *event)``."""
        # A size of 1 would broadcast along the event without a word.
        shape = self.energy.batch_shape_of(x)
        try:
            shape = broadcast_shape(shape, self.batch_shape)  # torch's loads sympy
        except ValueError:
            raise ValueError(
                f"x must have shape (*sample, *batch, *event) with batch_shape "
                f"{tuple(self.batch_shape)} and event_shape {tuple(self.event_shape)}, "
                f"got {tuple(x.shape)}. The batch_shape comes from .expand() and from "
                "the plates around the site: give them the sizes of the data."
            ) from None
        if self._validate_args:
            self._validate_sample(x)
        return x.expand(torch.Size(shape) + self.event_shape)

    def _validate_sample(self, value: Tensor) -> None:
        if value.is_floating_point() and value.isnan().any():
            raise ValueError(
                f"x must not contain nan, got {int(value.isnan().sum())} nan in "
                f"{value.numel()} numbers. Drop the rows, or mask them with "
                "poutine.mask after filling them with any point of the support."
            )
        inside = self.support.check(value)
        if not inside.all():
            outside = value[~inside][:1] if inside.dim() else value
            raise ValueError(
                f"x must lie in the support {self.support}; {int((~inside).sum())} of "
                f"{inside.numel()} points do not, the first is {outside.tolist()}. "
                "Give the energy the support of the data, or transform the data."
            )

    def _formula(self) -> str:
        return type(self.energy).__name__

    def __repr__(self) -> str:
        shape = f"batch_shape: {tuple(self.batch_shape)}, "
        return (
            f"{type(self).__name__}({self._formula()}, {shape}event_shape: "
            f"{tuple(self.event_shape)}, log Z: {log_partition_text(self)})"
        )

    def _repr_html_(self) -> str:
        return distribution_html(self, f"exp(-f(x)) / Z, f: {self._formula()}")


class _IndependentEnergies(dist.Independent):
    """``dist.Independent``, which would not ask the energy for its score parts."""

    def score_parts(self, *args: Any, **kwargs: Any) -> Any:
        self.base_dist.require_fit_for_guide()
        return super().score_parts(*args, **kwargs)


def leaves(value: Tensor, x: Tensor) -> list[Tensor]:
    """All leaves that a value depends on other than through ``x``, no leaf itself."""
    seen: set[Any] = {x.grad_fn}
    found, stack = [], [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return found


def _as_scalar(
    log_partition: "float | Tensor | LogPartitionEstimate | None", energy: Energy
) -> Tensor:
    if log_partition is None:
        return torch.zeros((), **energy.tensor_options())
    if isinstance(log_partition, LogPartitionEstimate):
        if log_partition.status == "not_normalizable":
            raise ValueError(
                f"log_partition says that the energy has no partition function: "
                f"{log_partition.reason}. Bound the energy, or give it a base."
            )
        if not log_partition.is_reliable:
            warnings.warn(str(log_partition), UnreliableWarning, stacklevel=3)
        log_partition = log_partition.value
    if not isinstance(log_partition, Tensor):
        if math.isnan(log_partition):
            raise ValueError(
                "log_partition must be a number, got nan. Give None if it is unknown."
            )
        log_partition = torch.as_tensor(log_partition, **energy.tensor_options())
    if log_partition.numel() != 1:
        raise ValueError(
            f"log_partition must be one number, got shape {tuple(log_partition.shape)}."
        )
    return log_partition.reshape(()) if log_partition.dim() else log_partition


def _bind_parameters(energy: Energy) -> None:
    """Touch every Pyro-managed parameter now, while the model runs.

    Pyro calls ``log_prob`` after the model has returned; a parameter first read there
    would be missing from the trace, and silently never trained.
    """
    # What a Pyro model samples are coordinates of its energy, not parameters.
    models = [m for m in energy.modules() if isinstance(m, PyroModelEnergy)]
    of_models = {module for model in models for module in model.modules()}
    for module in energy.modules():
        if isinstance(module, PyroModule):
            if module._pyro_samples and module not in of_models:
                raise NotImplementedError(
                    f"{sorted(module._pyro_samples)} of {type(module).__name__} are "
                    "PyroSample: a prior over the parameters of an energy makes the "
                    "posterior doubly intractable. Use PyroParam or nn.Parameter."
                )
            for name in (*module._pyro_params, *module._parameters):
                getattr(module, name)
