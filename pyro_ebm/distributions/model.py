r"""The module that owns an energy, its chains and its :math:`\log Z`.

While the energy is learned, :math:`\log Z` has a gradient in the parameters,

.. math::
    \partial_\theta \log Z = -\mathbb{E}_{x \sim q_\theta}[\partial_\theta f_\theta(x)]
                                                                            \tag{1}

With it ``log_prob`` has the gradient of the likelihood (1.16), and ``SVI`` learns an
energy as any other distribution. It is found by the first backward pass of each set of
parameters, from persistent chains or from weighted draws of the base, and kept.
"""

__all__ = ["EnergyModel", "an_objective_learns"]

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.bases.saving import from_state, to_state
from pyro_ebm.core.html import rows_table, with_error
from pyro_ebm.core.verdict import in_words
from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.operators import Factor
from pyro_ebm.energies import DistributionEnergy, Energy
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.views.unconstrained import (
    is_finite_support,
    is_unconstrained,
)
from pyro_ebm.mcmc import (
    MALA,
    ImportanceResampling,
    IndependentChains,
    PersistentChains,
    Sampler,
)
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition import LogPartition, LogPartitionEstimate
from pyro_ebm.partition.default_base import default_base, standard_base
from pyro_ebm.partition.generator import (
    FittedGenerator,
    fit_generator,
    restored,
    saved,
)
from pyro_ebm.partition.tracking.weighted_draws import WeightedDraws

#: Number, transitions a step and restarts of the chains; see MaximumLikelihood.
_CHAINS = (256, 10, 0.004)
#: Weighted draws that are kept, and those of a step.
_POOL, _DRAWS = 20_000, 1024


class EnergyModel(Factor, nn.Module):
    r"""Learnable energy with its base, its chains and its estimate of :math:`\log Z`.

    Calling it gives the distribution of the current parameters, to be used at a
    ``pyro.sample`` site. In ``train()``, as it is built, ``log_prob`` has the gradient
    of the likelihood, so that ``SVI`` learns the energy under any ELBO, with plates,
    scales, masks and subsampling; in ``eval()`` :math:`\log Z` is a number. Its
    ``state_dict`` holds the parameters, the averaged parameters, :math:`\log Z` with
    the walkers that track it, and the chains.

    Args:
        energy: The energy :math:`f_\theta`.
        base: A normalised Pyro distribution on the same event and support, somewhat
            wider than the data: reference for :math:`\log Z` and start of all chains.
            Default: ``"auto"``, a density that :func:`pyro_ebm.fit` fits to the data
            (:func:`pyro_ebm.bases.fit`; independent sites on a finite support, latent
            classes where columns are real and categorical) and that a network without a
            base then corrects; until then standard normal in
            unconstrained space, or uniform.
        sampler: How the distribution draws; default: an HMC chain a draw from the base,
            and importance resampling where the base was fitted to the data.
        log_partition: A tracker with settings of your own; default:
            ``LogPartition(energy, base)``.
        source: Where the gradient of log Z comes from while learning: 256 persistent
            chains, or weighted draws of the base as long as enough of them count, which
            is the cheaper and what a base that was fitted to the data is taken for.

    Raises:
        ValueError: If the base has another event shape or support, or a batch shape, or
            there is a ``log_partition`` and no base.

    Example:
        >>> energy = pyro_ebm.energies.NeuralEnergy((2,), hidden_sizes=(16,))
        >>> model = EnergyModel(energy, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> model().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
        >>> model.log_partition.status
        'unreliable'
    """

    def __init__(
        self,
        energy: Energy,
        base: dist.TorchDistribution | str = "auto",
        *,
        sampler: Sampler | None = None,
        log_partition: LogPartition | None = None,
        source: Literal["chains", "importance"] = "chains",
    ) -> None:
        super().__init__()
        if not isinstance(energy, Energy):
            raise TypeError(
                f"energy must be an Energy, got {type(energy).__name__}. Wrap a "
                "callable: pyro_ebm.energies.FunctionEnergy(fn, event_shape)."
            )
        self.awaits_base = isinstance(base, str)
        if isinstance(base, str):
            if base != "auto" or log_partition is not None:
                raise ValueError(
                    f"base must be a Pyro distribution, or 'auto' and no "
                    f"log_partition; got {base!r}. A tracker needs the base that it "
                    "was built with."
                )
            is_discrete = energy.support.is_discrete
            base = default_base(energy) if is_discrete else standard_base(energy)
        GeometricPath(energy, base)  # checks that they fit
        self.energy = energy
        self._base = DistributionEnergy(base)  # a module, so that .to() moves it
        self.sampler = sampler
        if log_partition is None:
            log_partition = LogPartition(energy, base)
        self.log_partition = log_partition
        self.chains = PersistentChains()
        self._fitted_base: dict[str, Any] = {}
        self._generator: DistributionEnergy | None = None
        self._known: list[torch.Tensor] = []
        self.source: Literal["chains", "importance"] = source
        self._parameters_when: dict[str, torch.Tensor] = {}

    @property
    def base(self) -> dist.TorchDistribution:
        r"""Reference for :math:`\log Z` and start of all chains."""
        return self._base.distribution

    def use_base(self, base: dist.TorchDistribution, x: torch.Tensor) -> None:
        """Take a density that was fitted to data for the base, in place of ``"auto"``.

        A network without a base corrects it from now on; any other energy stays as it
        is. The base is in the ``state_dict``.

        Args:
            base: From :mod:`pyro_ebm.bases`.
            x: Points that a network standardises by, shape ``(N, *event)``.

        Raises:
            RuntimeError: If the model was given a base, or has learned already.
        """
        if not self.awaits_base:
            raise RuntimeError(
                f"the model has a base, {self.base}. Build a new EnergyModel without "
                "one for a base that is fitted to data."
            )
        state = _to_state(base)
        GeometricPath(self.energy, base)
        self.energy.correct(base, x)
        self._take(base, state)
        if not is_finite_support(self.energy.support):
            self.source = "importance"

    def _take(self, base: dist.TorchDistribution, state: dict[str, Any]) -> None:
        self._base, self._fitted_base = DistributionEnergy(base), state
        self.log_partition = LogPartition(self.energy, base).to(
            self.log_partition.value.device
        )
        self.awaits_base, self.chains = False, PersistentChains()

    def exchange_base(self, base: dist.TorchDistribution) -> None:
        """Take the base that the energy corrects fitted to other rows, say to more.

        What is learned stays as it is. Log Z is unknown until it is estimated.

        Args:
            base: From :mod:`pyro_ebm.bases`.

        Raises:
            RuntimeError: If the energy is no correction of a base that was fitted here.

        Example:
            >>> data = torch.randn(100, 2)
            >>> model = EnergyModel(pyro_ebm.energies.NeuralEnergy((2,), (8,)))
            >>> model.use_base(pyro_ebm.bases.normal(data[:80]), data)
            >>> model.exchange_base(pyro_ebm.bases.normal(data))
            >>> torch.allclose(model.energy.base.loc, data.mean(0), atol=1e-6)
            True
        """
        energy: Any = self.energy
        if not self._fitted_base or getattr(energy, "base", None) is not self.base:
            raise RuntimeError(
                "the energy must correct a base that pyro_ebm.fit has fitted, got "
                f"{type(energy).__name__} with {self.base}. Build a new EnergyModel."
            )
        state = _to_state(base)
        GeometricPath(energy, base)
        energy.base_energy = DistributionEnergy(base)
        self._take(base, state)

    def amortize(
        self, *, max_seconds: float = 20.0, progress_bar: bool = True
    ) -> FittedGenerator:
        r"""Fit a generator to the current parameters: a density that draws at once.

        From now on the distribution of the model draws from the generator, by
        importance resampling, and says how many of its draws count
        (``sampling_diagnostics()``); it does so for other parameters too, as long as
        enough of them do, and by chains from the generator where they do not. The
        generator is in the ``state_dict``. Its ``distribution`` is a Pyro distribution
        to draw from, approximately, and a proposal for
        :func:`pyro_ebm.partition.importance_sampling`.

        Args:
            max_seconds: After which the fit ends.
            progress_bar: Whether to show it, if it takes more than a second.

        Returns:
            The generator, the effective fraction of its draws with its error,
            :math:`\log Z` by them, and a verdict.

        Raises:
            ImportError: If scikit-learn is not installed.
            NotImplementedError: If the support of the energy is finite.

        Exactness: draws of the generator are *biased* by as much as it differs from the
        model; those of the model by it are *consistent*.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> energy = pyro_ebm.energies.FunctionEnergy(lambda x: x**4 - 2 * x**2, ())
            >>> model = EnergyModel(energy, dist.Normal(0.0, 2.0))
            >>> model.amortize().effective_fraction > 0.8
            True
            >>> model().sample((10_000,)).shape
            torch.Size([10000])
        """
        found = fit_generator(
            self.energy, self.base, max_seconds=max_seconds, progress_bar=progress_bar
        )
        self._generator = DistributionEnergy(found.distribution)
        return found

    def get_extra_state(self) -> Any:
        """The base, where it was fitted to data, and the generator, if there is one."""
        state = dict(self._fitted_base)
        if self._generator is not None:
            state["generator"] = saved(self._generator.distribution)
        return state or torch.empty(0)

    def set_extra_state(self, state: Any) -> None:
        """Take base and generator of the model that was saved.

        A model that was built with a base keeps it; loading its log Z then refuses a
        state that was saved with another.
        """
        if not isinstance(state, dict):
            return
        if "kind" in state and self.awaits_base:
            base: dist.TorchDistribution
            if state["kind"] == "sites":
                base = IndependentSites(self.energy.support, state["log_probs"])
            else:
                is_real = is_unconstrained(self.energy.support)
                base = from_state(state, None if is_real else self.energy.support)
            self.use_base(base, base.sample((2,)))  # loaded after this: any will do
        if "generator" in state:
            self._generator = DistributionEnergy(
                restored(state["generator"], self.base, self.energy.support)
            )

    def forward(self) -> EnergyDistribution:
        r"""The distribution of the current parameters.

        Where the energy knows its :math:`\log Z` in closed form, that is used, with its
        gradient. Otherwise it is the tracked value; ``is_normalized`` is false while
        that is unreliable. Before there is one :math:`\log Z` counts as 0, but for
        ``log_prob`` in ``train()`` with gradients on, which makes the first estimate.
        """
        known = self.energy.closed_form()
        if known is not None:
            return self._distribution(self.energy, known.log_partition)
        tracked = self.log_partition
        # While learning, the value of the last update will do.
        if (
            tracked.is_started
            and not torch.is_grad_enabled()
            and self._has_moved("evaluated")
        ):
            tracked.read(self.energy)
        value = tracked.value.clone() if tracked.value.isfinite() else None
        distribution = self._distribution(self.energy, value)
        distribution.is_normalized = tracked.status.is_reliable
        distribution.log_partition_std_error = tracked.std_error
        if _gradient_is_wanted(self) and self._learned():
            distribution._gradient = self._log_partition_gradient
        return distribution

    def averaged(
        self, log_partition: LogPartitionEstimate | None = None
    ) -> EnergyDistribution:
        r"""The distribution of the averaged parameters with its own :math:`\log Z`.

        The better model while learning: what is reported and what ``fit`` returns.

        Args:
            log_partition: An estimate for these parameters; default: the tracked one.

        Raises:
            RuntimeError: If nothing has been learned yet.
        """
        if not self.log_partition.is_started:
            raise RuntimeError(
                "there is no average before the first step of learning. Train the "
                "model, or call model.log_partition.refresh(model.energy)."
            )
        estimate = log_partition or self.log_partition.averaged()
        value = torch.tensor(estimate.value) if math.isfinite(estimate.value) else None
        distribution = self._distribution(self.log_partition.averaged_energy, value)
        distribution.is_normalized = estimate.is_reliable
        distribution.log_partition_std_error = estimate.std_error
        distribution.owner = None
        return distribution

    def set_log_partition(self, estimate: LogPartitionEstimate) -> None:
        r"""Take over an estimate of :math:`\log Z` of the current parameters.

        Its value and standard error hold from now on, and follow when learning goes on.

        Args:
            estimate: ``pyro_ebm.partition.estimate(model)``, say.

        Raises:
            ValueError: If the estimate is not reliable.
        """
        self.log_partition.set_log_partition(self.energy, estimate)

    def follow(self) -> None:
        r"""Let :math:`\log Z` follow, if the parameters have moved since last time."""
        if self._has_moved("followed") or not self.log_partition.is_started:
            self.log_partition.follow(self.energy)

    def _learned(self) -> list[nn.Parameter]:
        return [p for p in self.energy.parameters() if p.requires_grad]

    def _log_partition_gradient(self) -> torch.Tensor:
        r"""Zero, with the gradient of :math:`\log Z`; the value where it is the first.

        Raises:
            NotImplementedError: Under torch's JIT.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise NotImplementedError(
                "a model that learns an energy cannot be traced by torch's JIT: its "
                "chains, and the average over the steps, would be left as they were in "
                "the first step. Use the ELBO without Jit in its name, or "
                "energy_model.eval() where nothing is learned."
            )
        gradient = _with_gradient(self._gradients, self._learned())
        if self.log_partition.is_started:
            return gradient
        with pyro.poutine.block(), torch.no_grad():
            self._follow_source()
        first = self.log_partition.value.clone()
        return gradient + first if first.isfinite() else gradient

    def _gradients(self) -> list[torch.Tensor]:
        """Of log Z in each parameter; found anew when one has moved."""
        learned = self._learned()
        if self._has_moved("learned") or len(self._known) != len(learned):
            with pyro.poutine.block(), torch.enable_grad():
                value = self._log_partition_graph()
                found = torch.autograd.grad(value, learned, allow_unused=True)
            self._known = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(learned, found, strict=True)
            ]
        return self._known

    def _log_partition_graph(self) -> torch.Tensor:
        r"""A tensor with the gradient of :math:`\log Z`, after a step of learning."""
        energy, tracker = self.energy, self.log_partition
        self._follow_source()
        if self.source == "importance" and tracker.draws is not None:
            if tracker.status.is_reliable:
                return tracker.draws.some(energy, _DRAWS).logsumexp(0)
            tracker.follow_by(energy, None)  # too few count
            self.source = "chains"
        sampler = self.sampler or IndependentChains(base=self.base)
        kernel = kernel_for(energy, MALA())
        x = self.chains.follow(energy, sampler, kernel, *_CHAINS)
        return -energy(x).mean()

    def _follow_source(self) -> None:
        """Let the weighted draws or the walkers that log Z comes from follow."""
        tracker = self.log_partition
        if self.source == "importance" and tracker.draws is None:
            draws = WeightedDraws()
            draws.start(self.energy, self.base, _POOL)
            tracker.follow_by(self.energy, draws)
        self.follow()

    def _has_moved(self, since: str) -> bool:
        # By value: an optimiser that writes to .data leaves no trace on the version.
        parameters = [p.detach().flatten() for p in self.energy.parameters()]
        now = torch.cat(parameters) if parameters else torch.empty(0)
        last, self._parameters_when[since] = self._parameters_when.get(since), now
        return last is None or not torch.equal(last.to(now), now)

    @torch.no_grad()
    def adopt_average(self) -> None:
        """Make the averaged parameters the current ones; the end of learning."""
        self.log_partition.adopt_average(self.energy)

    def _distribution(
        self, energy: Energy, log_partition: torch.Tensor | None
    ) -> EnergyDistribution:
        sampler: Sampler | None = self.sampler
        if self._generator is not None and energy.closed_form() is None:
            sampler = ImportanceResampling(self._generator.distribution)
        elif sampler is None and energy.closed_form() is None:
            near = bool(self._fitted_base)  # to the data, hence to the model
            by_chains = IndependentChains(base=self.base)
            sampler = ImportanceResampling(self.base) if near else by_chains
        if log_partition is not None:
            log_partition = log_partition.to(**self.energy.tensor_options())
        distribution = EnergyDistribution(energy, log_partition, sampler=sampler)
        distribution.owner = self
        return distribution

    def __repr__(self) -> str:
        log_partition, verdict = _tracked_text(self)
        return (
            f"{type(self).__name__}(\n  energy: {self.energy}\n  base: {self.base}\n"
            f"  log Z: {log_partition} [{verdict}]\n)"
        )

    def _repr_html_(self) -> str:
        return _model_html(self)


def _to_state(base: dist.TorchDistribution) -> dict[str, Any]:
    if isinstance(base, IndependentSites):
        return {"kind": "sites", "log_probs": base.log_probs}
    return to_state(base)


#: Whether an objective supplies the gradients, so that a model does not.
_BY_OBJECTIVE: ContextVar[bool] = ContextVar("by_objective", default=False)


@contextlib.contextmanager
def an_objective_learns() -> Iterator[None]:
    """Context in which models give log Z without gradient: an objective supplies it."""
    token = _BY_OBJECTIVE.set(True)
    try:
        yield
    finally:
        _BY_OBJECTIVE.reset(token)


def _gradient_is_wanted(model: nn.Module) -> bool:
    """Whether log Z of a model is to have a gradient: in ``train()``.

    Args:
        model: An energy model.
    """
    return model.training and not _BY_OBJECTIVE.get()


def _with_gradient(
    find: Callable[[], Sequence[Tensor]], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """A tensor of value zero whose gradient is found when it is asked for.

    So what is only evaluated, or differentiated in other things, costs nothing and
    changes nothing.

    Args:
        find: Gives the gradient in each parameter.
        parameters: Of which there is at least one.

    Returns:
        Shape ``()``.
    """
    zero: Tensor = _Found.apply(find, *parameters)
    return zero


class _Found(torch.autograd.Function):
    """Zero, with a gradient that a function finds."""

    @staticmethod
    def forward(ctx: Any, find: Any, *parameters: Tensor) -> Tensor:
        ctx.find = find
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None, *[grad * part for part in ctx.find()])


def _tracked_text(model: Any) -> tuple[str, str]:
    r""":math:`\log Z` of an ``EnergyModel`` with its error, and the verdict.

    Args:
        model: The model; of an energy with a closed form the exact value is shown.
    """
    known = model.energy.closed_form()
    if known is not None:
        return with_error(known.log_partition.detach().item(), 0.0), "exact"
    tracked = model.log_partition
    value, error = tracked.value.item(), tracked.std_error.item()
    shown = with_error(value, error) if math.isfinite(value) else "unknown"
    return shown, in_words(tracked.status, tracked.reasons)


def _model_html(model: Any) -> str:
    r"""The table of an ``EnergyModel``, with the tracked :math:`\log Z`.

    Args:
        model: The model.
    """
    log_partition, verdict = _tracked_text(model)
    rows = {
        "energy": type(model.energy).__name__,
        "event shape": str(tuple(model.energy.event_shape)),
        "support": str(model.energy.support),
        "base": str(model.base),
        "parameters": f"{sum(p.numel() for p in model.energy.parameters()):,}",
        "log Z": log_partition + (" nats" if log_partition != "unknown" else ""),
        "verdict": verdict,
    }
    return rows_table(type(model).__name__, rows)
