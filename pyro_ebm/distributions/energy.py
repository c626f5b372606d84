r"""An energy as a Pyro distribution.

.. math::
    \log q(x) = -f(x) - \log Z                                              \tag{1}
"""

__all__ = ["EnergyDistribution"]

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence, register_kl

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.html import with_error
from pyro_ebm.core.validation import expands_to
from pyro_ebm.core.verdict import Status
from pyro_ebm.distributions.operators import Factor
from pyro_ebm.distributions.pool import Pool
from pyro_ebm.distributions.representation import distribution_html
from pyro_ebm.energies import ClosedForm, Energy, PyroModelEnergy
from pyro_ebm.energies.discrete.exact.distribution import can_be_enumerated, enumerated
from pyro_ebm.energies.discrete.finite import require_inside
from pyro_ebm.energies.pyro_modules import leaves_of, name_pyro_modules
from pyro_ebm.energies.views.batch import JointEnergy
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
        log_partition: :math:`\log Z` in nats: a number, a tensor of the energy's batch
            shape, an estimate of :mod:`pyro_ebm.partition`, or ``None`` for that of the
            energy's closed form. Without one it is unknown, counts as 0, and
            ``is_normalized`` is false.
        sampler: How to draw; default: one HMC chain a draw, or exactly where the energy
            has a closed form.
        validate_args: Whether ``log_prob`` checks its argument; Pyro's default.

    Raises:
        TypeError: If ``energy`` is no :class:`~pyro_ebm.energies.Energy`.
        ValueError: If ``log_partition`` is not one number, or one for each energy of a
            batch, or an estimate says that there is no partition function.
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
        self._is_known = log_partition is not None
        #: Drawn in a run whose draws an algorithm is to weigh.
        self._proposal: weakref.ref[Tensor] | None = None
        self.is_normalized = log_partition is not None and (
            not isinstance(log_partition, LogPartitionEstimate)
            or log_partition.is_reliable
        )
        self.sampler = sampler
        # The module that keeps parameters and chains, set by EnergyModel.
        self.owner: Any = None
        shapes = energy.batch_shape, energy.event_shape
        super().__init__(*shapes, validate_args=validate_args)

    @property
    def log_partition(self) -> Tensor:
        r""":math:`\log Z` in nats, of the energy's batch shape.

        Of an :class:`~pyro_ebm.EnergyModel` in ``train()`` it has the gradient
        :math:`-\mathbb{E}_q[\partial f]` while gradients are on, and is estimated
        where there was no estimate.
        """
        if self._gradient is None or not torch.is_grad_enabled():
            return self._log_partition
        return self._log_partition + self._gradient()

    @log_partition.setter
    def log_partition(self, value: Tensor) -> None:
        self._log_partition, self._gradient = value, None
        self._is_known = True

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
        """The same distribution with another batch shape.

        Raises:
            ValueError: If the present one does not expand to it.
        """
        wanted, present = tuple(batch_shape), tuple(self.batch_shape)
        if not expands_to(self.batch_shape, torch.Size(wanted)):
            raise ValueError(
                f"batch_shape must be one that {present}, the present batch_shape, "
                f"expands to, got {wanted}. New sizes go to the left, and only sizes "
                "of 1 may change."
            )
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

        Warns:
            UnreliableWarning: If SVI is given parameters of the energy, and
                ``log_partition`` has no gradient in them.

        Raises:
            ValueError: If ``x`` is outside the support, or if ``log_partition`` is a
                free parameter: the likelihood is then unbounded.
            NotImplementedError: If the energy depends on a latent variable while
                ``log_partition`` does not.
        """
        self.require_no_free_log_partition()
        if not self._is_known:
            self._require_no_proposal(x)
            self._require_no_latents()
        x = self._expanded(x)
        value = -self.energy(x)
        log_partition = self.log_partition
        # The gradient of a model is that in its own parameters.
        is_blind = self._gradient is not None or not log_partition.requires_grad
        if value.requires_grad and is_blind:
            self._require_no_latent_energy(value, x)
            if self._gradient is None:
                self._warn_if_optimised()
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
            if closed_form is not None and self.energy.batch_shape:
                whole = closed_form.distribution.expand(self.batch_shape)
                draws = whole.sample(torch.Size(sample_shape))
            elif closed_form is not None:
                draws = closed_form.distribution.sample(torch.Size([num_draws]))
            else:
                target, sampler = self.energy, self._sampler
                if target.batch_shape:  # all members at once
                    target = JointEnergy(target, self.batch_shape)
                    sampler = _of_all(sampler, self.batch_shape)
                    num_draws = math.prod(sample_shape)
                if any(isinstance(handler, InitMessenger) for handler in _PYRO_STACK):
                    draws = sampler.start(target, num_draws)
                else:
                    draws = Pool.of(target, sampler).take(target, num_draws)
        draws = draws.reshape(shape)
        self._proposal = weakref.ref(draws) if _draws_are_weighed() else None
        return draws

    def sampling_diagnostics(self) -> SamplingDiagnostics:
        """How the last draws of :meth:`sample` were made, and how good they are.

        Returns:
            ``"exact"`` by a closed form; by chains their R-hat and a verdict. Of a
            batch of energies without a closed form it is not kept.

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
            found = Pool.last_diagnostics(self.energy, self._sampler)
        if found is None:
            raise RuntimeError(
                "there are no draws of the energy as it is now: call sample first."
            )
        return found

    def closed_form(self) -> ClosedForm | None:
        """What is known of the energy without sampling, or ``None``."""
        return self.energy.closed_form()

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> Any:
        """Pyro asks for shapes from shapes; those of an energy are its own.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{cls.__name__} has the event_shape and batch_shape of its energy, not of "
            "the shapes of arguments. Build it, and ask for .event_shape."
        )

    @property
    def mean(self) -> Tensor:
        """The mean, of a closed form.

        Raises:
            NotImplementedError: If there is none, as for the other moments.
        """
        mean: Tensor = self._normal_form("mean").mean
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def mode(self) -> Tensor:
        """The mode, of a closed form."""
        mode: Tensor = self._normal_form("mode").mode
        return mode.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate, of a closed form."""
        variance: Tensor = self._normal_form("variance").variance
        return variance.expand(self.batch_shape + self.event_shape)

    def entropy(self) -> Tensor:
        """The entropy in nats, of a closed form, shape ``(*batch,)``."""
        entropy: Tensor = self._normal_form("entropy").entropy()
        return entropy.expand(self.batch_shape)

    def _normal_form(self, name: str) -> Any:
        """The normalised distribution, for what is known of it alone."""
        known = self.closed_form()
        if known is None or isinstance(known.distribution, EnergyDistribution):
            raise NotImplementedError(
                f"{self} has no {name} in closed form. Draw from it, "
                f"q.sample((10_000,)), or estimate what you need of draws of "
                "pyro_ebm.mcmc.MCMC, which says how good they are."
            )
        return known.distribution

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: numbers, and no graph."""
        state = {**vars(self), "_proposal": None}
        if not self._log_partition.is_leaf:
            state["_log_partition"] = self._log_partition.detach()
            state["_had_graph"] = True
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state; log Z of a closed form has its gradient again."""
        had_graph = state.pop("_had_graph", False)
        self.__dict__.update(state)
        known = self.energy.closed_form() if had_graph else None
        if known is not None and torch.allclose(
            known.log_partition, self._log_partition
        ):
            self._log_partition = known.log_partition

    def __copy__(self) -> "EnergyDistribution":
        """A shallow copy, of the same energy and graph."""
        new = self.__new__(type(self))
        new.__dict__.update(vars(self))
        return new

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
        if reinterpreted_batch_ndims == 0:
            return self
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
                f"{self} stands in a guide, or in a model under an ELBO that scores "
                "the model's own draws (TraceTMC_ELBO): there its log_prob must be "
                "normalised with a gradient, and its log Z has no closed form. Use a "
                "normalised guide (an AutoGuide, a flow) and put the energy in the "
                "model, under another ELBO."
            )
        exact = known.log_partition
        needs_gradient = torch.is_grad_enabled() and exact.requires_grad
        if not torch.allclose(self.log_partition, exact) or (
            needs_gradient and not self.log_partition.requires_grad
        ):
            raise NotImplementedError(
                f"{self} stands in a guide, or in a model under TraceTMC_ELBO, where "
                "its log_prob must be normalised with a gradient; log_partition is "
                f"{_shown(self.log_partition)}, the closed form is "
                f"{_shown(exact)}. Build the distribution by an EnergyModel, or "
                "leave log_partition=None."
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
        foreign = [leaf for leaf in leaves_of(value, x) if id(leaf) not in own]
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

    def _warn_if_optimised(self) -> None:
        """Tell that SVI is given parameters whose log Z has no gradient."""
        handlers = (h for h in _PYRO_STACK if isinstance(h, TraceMessenger))
        traces = [h.trace for h in handlers if h.param_only]
        sites: list[Any] = [site for t in traces for site in t.nodes.values()]
        given = {id(s["value"].unconstrained()) for s in sites if s["type"] == "param"}
        if given.isdisjoint(id(p) for p in self.energy.parameters() if p.requires_grad):
            return
        message = (
            f"SVI moves parameters of {type(self.energy).__name__}, in which log Z has "
            "no gradient: the energy will fall at the data without bound. Take an "
            "EnergyModel in train(), pyro_ebm.infer.Learn, or a log_partition that is "
            "a function of the parameters; requires_grad_(False) holds them."
        )
        warnings.warn(message, UnreliableWarning, stacklevel=3)

    def _require_no_proposal(self, x: Tensor) -> None:
        """Refuse to weigh a draw by a density that is not normalised."""
        if self._proposal is None or self._proposal() is not x:
            return
        raise NotImplementedError(
            f"{self} stands in a guide: its draw is to be weighed by its density, and "
            "log Z, which shifts every weight, is missing. Give it one, "
            "EnergyDistribution(energy, "
            "pyro_ebm.partition.estimate(energy, base)), or use a normalised guide."
        )

    def _require_no_latents(self) -> None:
        """Refuse an energy of latent variables that no gradient tells of."""
        names = {name for e in _own_energies(self.energy) for name in e.built_after}
        if not names:
            return
        raise NotImplementedError(
            f"the energy of {self} was built by a model that had sampled "
            f"{', '.join(sorted(names))}, and log Z, which is missing, may depend on "
            "what it was built of: the weights of Importance, SMCFilter or enumeration "
            "would be off by it. Give a log_partition that is a function of the latent "
            "variables (exact, by partition.estimate, or amortised), or build the "
            "energy outside of the model if it depends on none of them."
        )

    @property
    def _sampler(self) -> Sampler:
        return IndependentChains() if self.sampler is None else self.sampler

    def _expanded(self, x: Tensor) -> Tensor:
        """The points, checked, in the shape ``(*sample, *batch, *event)``."""
        # A size of 1 would broadcast along the event without a word.
        shape = self.energy.shape_without_event(x)
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
        require_inside(self.support, value)

    def _log_partition_text(self) -> str:
        r""":math:`\log Z` with its error, if it is known."""
        values = torch.as_tensor(self._log_partition).detach()  # moves no chains
        if values.dim() and self.is_normalized:
            return f"{values.min():.4f} to {values.max():.4f}"
        value, error = (
            torch.as_tensor(number).detach().double().mean().item()
            for number in (values, self.log_partition_std_error)
        )
        shown = with_error(value, error)
        if self.is_normalized:
            return shown
        return f"unknown ({shown} is unreliable)" if error > 0 else "unknown"

    def _formula(self) -> str:
        return type(self.energy).__name__

    def __repr__(self) -> str:
        shape = f"batch_shape: {tuple(self.batch_shape)}, "
        return (
            f"{type(self).__name__}({self._formula()}, {shape}event_shape: "
            f"{tuple(self.event_shape)}, log Z: {self._log_partition_text()})"
        )

    def _repr_html_(self) -> str:
        return distribution_html(self, f"exp(-f(x)) / Z, f: {self._formula()}")


def _of_all(sampler: Any, batch_shape: torch.Size) -> Any:
    """A sampler with the base of one energy, for all energies of a batch at once."""
    base = getattr(sampler, "base", None)
    if base is None or base.batch_shape or not dataclasses.is_dataclass(sampler):
        return sampler
    bases = base.expand(batch_shape).to_event(len(batch_shape))
    return dataclasses.replace(sampler, base=bases)  # type: ignore[type-var]


def _shown(value: Tensor) -> str:
    return ", ".join(f"{number:.6g}" for number in value.detach().flatten().tolist())


def _draws_are_weighed() -> bool:
    """Whether a guide is being run whose draws are going to be weighed.

    Importance and SMCFilter hide its trace from handlers around them. Replayed runs,
    the model's own prior and the search for initial values have a handler further in.
    """
    handlers = [
        handler
        for handler in _PYRO_STACK
        if isinstance(
            handler, BlockMessenger | TraceMessenger | ReplayMessenger | InitMessenger
        )
    ]
    traced = [k for k, h in enumerate(handlers) if isinstance(h, TraceMessenger)]
    if not traced or traced[-1] + 1 < len(handlers):
        return False
    return any(isinstance(h, BlockMessenger) for h in handlers[: traced[-1]])


def _own_energies(energy: Energy) -> Iterator[Energy]:
    """Those inside an energy that were given something else than energies."""
    for part in energy.modules():
        if isinstance(part, Energy):
            energies = [m for m in part.modules() if isinstance(m, Energy)]
            if len(energies) == 1 or any(b is not None for b in part._buffers.values()):
                yield part


class _IndependentEnergies(dist.Independent):
    """``dist.Independent``, which would not ask the energy for its score parts."""

    def score_parts(self, *args: Any, **kwargs: Any) -> Any:
        self.base_dist.require_fit_for_guide()
        return super().score_parts(*args, **kwargs)


def _as_scalar(
    log_partition: "float | Tensor | LogPartitionEstimate | None", energy: Energy
) -> Tensor:
    if log_partition is None:
        return torch.zeros(energy.batch_shape, **energy.tensor_options())
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
    batch_shape = energy.batch_shape
    if batch_shape and expands_to(log_partition.shape, batch_shape):
        is_free = log_partition.requires_grad and log_partition.is_leaf
        # What is free is refused when used, and must be known as that.
        return log_partition if is_free else log_partition.expand(batch_shape)
    if batch_shape or log_partition.numel() != 1:
        raise ValueError(
            "log_partition must be one number"
            + (f", or of batch_shape {tuple(batch_shape)}" if batch_shape else "")
            + f", got shape {tuple(log_partition.shape)}."
        )
    return log_partition.reshape(()) if log_partition.dim() else log_partition


def _bind_parameters(energy: Energy) -> None:
    """Touch every Pyro-managed parameter now, while the model runs.

    Pyro calls ``log_prob`` after the model has returned; a parameter first read there
    would be missing from the trace, and silently never trained.
    """
    name_pyro_modules(energy)
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
            with module._pyro_context:
                for name in (*module._pyro_params, *module._parameters):
                    getattr(module, name)


def _normalised(distribution: Any) -> Any:
    """What torch knows the divergences of."""
    if isinstance(distribution, EnergyDistribution):
        inner = distribution._normal_form("Kullback-Leibler divergence")
        shape = distribution.batch_shape
        distribution = inner if inner.batch_shape == shape else inner.expand(shape)
    normal = getattr(distribution, "base_dist", None)
    if distribution.event_dim == 1 and isinstance(normal, torch.distributions.Normal):
        loc, scale = normal.loc, normal.scale.diag_embed()
        return dist.MultivariateNormal(loc, scale_tril=scale, validate_args=False)
    return distribution


def _divergence(p: Any, q: Any) -> Tensor:
    """The divergence of two distributions, of which some are energies."""
    return kl_divergence(_normalised(p), _normalised(q))


register_kl(dist.Delta, EnergyDistribution)(lambda p, q: -q.log_prob(p.v))  # Pyro's
register_kl(EnergyDistribution, EnergyDistribution)(_divergence)
register_kl(EnergyDistribution, torch.distributions.Distribution)(_divergence)
register_kl(torch.distributions.Distribution, EnergyDistribution)(_divergence)
