"""The user interface of MCMC with many chains.

It stands where ``pyro.infer.MCMC`` stands, with thousands of chains in one tensor
instead of one a process.
"""

__all__ = ["MCMC"]

import dataclasses
import inspect
import warnings
from typing import Any, final

import torch
from torch import Tensor

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.mcmc.kernels.chees import ChEES
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for
from pyro_ebm.mcmc.report.analysis import diagnose, moments_of, summarize
from pyro_ebm.mcmc.report.results import Diagnostics, Moments
from pyro_ebm.mcmc.report.summary import Summary
from pyro_ebm.mcmc.run.draws import KeptDraws
from pyro_ebm.mcmc.run.driver import ChainRun, step_size_of
from pyro_ebm.mcmc.run.target import (
    ChainKernel,
    ChainTarget,
    resolve_target,
    standardised,
)
from pyro_ebm.mcmc.starts.start import choose_non_centred, start_chains


@final
class MCMC:
    r"""Run many chains on an energy or a Pyro model.

    From 64 chains on, the chains are groups, 8 to 16 of them, each of which starts at
    one point: only so can many short chains show that they have forgotten their start.

    Normal sites of a Pyro model, multivariate ones too, whose scale is latent are
    standardised where the first transitions show that this suits the chains better; the
    draws are those of the sites, and the diagnostics name them. Points of ``initial``
    leave the model as is.

    Args:
        kernel: What moves the chains. Default: ``ChEES()``, which wants several; over a
            finite support ``Gibbs()`` where blocks are known, the sites are few or
            there is no gradient, else ``DiscreteLangevin()``.
        num_samples: Draws of each chain.
        warmup_steps: Transitions before them, in which the kernel adapts.
        num_chains: Chains, all moved at once.
        thinning: Transitions a draw.
        initial: Where to start: points of the support, shape ``(K, *event)`` with ``K``
            a divisor of ``num_chains``; of a Pyro model a dict of values of all sites,
            shape ``(K, *site)``, or unconstrained vectors. Default: the base of an
            ``EnergyModel``; for a Pyro model overdispersed draws of the best normal
            approximations on descents from uniform points in (-2, 2), if there is a
            warm-up (Pathfinder, Zhang et al. 2022); else a standard normal in
            unconstrained space, or uniform on a finite support.
        progress_bar: Whether to show acceptance, divergences and a rough R-hat.
        compile: Whether to compile the energy's gradient with ``torch.compile``:
            several times faster, after some seconds.
        keep_draws: Whether to keep the draws. If not, only moments, R-hat and sample
            sizes come out, by batch means, in memory that does not grow.
        dtype: In which the energy is computed: ``torch.float64``, or the target's own.
            Default: double precision for a Pyro model on a CPU, whose energies single
            precision often cannot hold, else the target's own. The draws of a site come
            in the type of the model.

    Raises:
        TypeError: If ``kernel`` is no kernel.
        ValueError: If a number is out of range.

    Example:
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     pyro.sample(
        ...         "y", dist.Normal(loc, 1.0).expand(y.shape).to_event(1), obs=y
        ...     )
        >>> mcmc = MCMC(None, 100, 100, num_chains=256, progress_bar=False)
        >>> mcmc.run(model, torch.tensor([1.0, 2.0, 3.0]))
        >>> mcmc.get_samples()["loc"].shape, mcmc.diagnostics().status
        (torch.Size([25600]), 'ok')
    """

    def __init__(
        self,
        kernel: ChainKernel | None = None,
        num_samples: int = 1000,
        warmup_steps: int = 300,
        num_chains: int = 64,
        *,
        thinning: int = 1,
        initial: Any = None,
        progress_bar: bool = True,
        compile: bool = False,
        keep_draws: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        is_kernel = isinstance(kernel, ChainKernel) and not isinstance(kernel, type)
        if kernel is not None and not is_kernel:
            raise TypeError(
                "kernel must be a kernel of pyro_ebm.mcmc, such as HMC(), got "
                f"{kernel!r}. Kernels of Pyro run in pyro.infer.MCMC."
            )
        counts = {
            "num_samples": (num_samples, 1),
            "warmup_steps": (warmup_steps, 0),
            "num_chains": (num_chains, 1),
            "thinning": (thinning, 1),
        }
        for name, (count, least) in counts.items():
            if count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}.")
        self.kernel: ChainKernel | None = kernel
        self.num_samples, self.warmup_steps = num_samples, warmup_steps
        self.num_chains, self.thinning = num_chains, thinning
        self.initial, self.progress_bar = initial, progress_bar
        self.compile, self.keep_draws, self.dtype = compile, keep_draws, dtype
        self._run: ChainRun | None = None
        self._saved: dict[str, Any] | None = None
        self._diagnostics: Diagnostics | None = None

    def run(self, target: Any, /, *args: Any, **kwargs: Any) -> None:
        """Warm up and draw; what there was of an earlier run is dropped.

        An interrupt leaves the draws so far, and :meth:`resume` goes on from there.

        Args:
            target: An ``Energy``, ``EnergyDistribution``, ``EnergyModel`` or a Pyro
                model.
            *args: Of the model.
            **kwargs: Of the model.

        Raises:
            TypeError: If ``target`` is none of these.
            ValueError: If the target is discrete and the kernel is not, or the initial
                points do not fit.
            DivergenceError: If the energy is finite at no initial point, or no chain
                moves.

        Warns:
            UnreliableWarning: If the verdict of :meth:`diagnostics` is not ``"ok"``.
        """
        self._saved = self._run = self._diagnostics = None
        resolved, kernel = self._resolved(target, args, kwargs)
        is_adapted = self.warmup_steps > 0
        start = start_chains(
            resolved, kernel, self.num_chains, self.initial, is_adapted=is_adapted
        )
        sites: tuple[str, ...] = ()
        if is_adapted and self.initial is None:
            sites = choose_non_centred(resolved, start)
        if sites:
            resolved = standardised(resolved, sites)
            start = start_chains(resolved, kernel, self.num_chains)
        self._run = ChainRun(
            resolved,
            start.kernel,
            start.state,
            num_superchains=start.num_groups,
            warmup_steps=self.warmup_steps,
            keep_draws=self.keep_draws,
            num_moved=start.num_moved,
        )
        self._advance(self._run, self.num_samples)

    def _resolved(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ChainTarget, ChainKernel]:
        """The target where the chains move, and what moves them there."""
        found = resolve_target(
            target, self.kernel, args, kwargs, compile=self.compile, dtype=self.dtype
        )
        return found, self.kernel or kernel_for(found.energy, ChEES())

    def resume(
        self,
        num_samples: int | None = None,
        target: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Draw more, going on exactly where the run, or the loaded state, had ended.

        After :meth:`load_state_dict` torch's random numbers go on from there too.

        Args:
            num_samples: More draws of each chain; default: as many as in a run.
            target: As in :meth:`run`; needed once after :meth:`load_state_dict`.
            *args: Of the model.
            **kwargs: Of the model.

        Raises:
            RuntimeError: If there is nothing to resume.
            ValueError: If ``num_samples`` is negative, or the target is missing or not
                that of the state.

        Warns:
            UnreliableWarning: If the verdict of :meth:`diagnostics` is not ``"ok"``.
        """
        num_samples = self.num_samples if num_samples is None else num_samples
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples}.")
        if self._saved is not None:
            self._run = self._restore(self._saved, target, args, kwargs)
            self._saved = None
        elif target is not None:
            raise ValueError(
                "target is that of the run, and need only be given after "
                "load_state_dict. To start anew call run."
            )
        self._advance(self._started(), num_samples)

    def _advance(self, run: ChainRun, num_samples: int) -> None:
        self._diagnostics = None
        run.warm_up(progress_bar=self.progress_bar)
        run.sample(num_samples, self.thinning, progress_bar=self.progress_bar)
        found = self.diagnostics()
        if not found.is_reliable:
            warnings.warn(str(found), UnreliableWarning, stacklevel=3)

    def _started(self) -> ChainRun:
        if self._run is None:
            raise RuntimeError(
                "there are no chains yet: call run first"
                + (", or resume with the target." if self._saved else ".")
            )
        return self._run

    def _restore(
        self,
        saved: dict[str, Any],
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> ChainRun:
        if target is None:
            raise ValueError(
                "target is needed to resume a loaded state, which does not hold it: "
                "resume(num_samples, target, ...)."
            )
        resolved, kernel = self._resolved(target, args, kwargs)
        return ChainRun.restored(
            resolved, kernel, saved["run"], keep_draws=self.keep_draws
        )

    def get_samples(
        self, *, group_by_chain: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The draws, mapped to the support.

        Args:
            group_by_chain: Whether to keep the dimension of chains.

        Returns:
            A tensor of an energy, a dict of the sites of a Pyro model; each of shape
            ``(num_chains, num_draws, *event)`` by chain, else
            ``(num_chains * num_draws, *event)``.

        Raises:
            RuntimeError: If nothing was run, or the draws were not kept.
        """
        samples = self._started().samples()
        if not group_by_chain:
            samples = {name: value.flatten(0, 1) for name, value in samples.items()}
        return self._by_site(samples)

    def moments(self) -> Moments | dict[str, Moments]:
        """Mean and variance with errors, also where draws were not kept.

        Returns:
            Those of an energy, or a dict of the sites of a Pyro model.

        Raises:
            RuntimeError: If nothing was run.
        """
        return self._by_site(moments_of(self._started(), self.diagnostics()))

    def diagnostics(self) -> Diagnostics:
        """Convergence of each site, divergences, stuck chains, and a verdict.

        Raises:
            RuntimeError: If nothing was run.
        """
        run = self._started()
        if self._diagnostics is None:
            self._diagnostics = diagnose(run)
        return self._diagnostics

    def summary(self, prob: float = 0.9) -> Summary:
        """A table to print: moments, quantiles, sample sizes and R-hat.

        Args:
            prob: Of the central interval.

        Raises:
            RuntimeError: If nothing was run.
            ValueError: If ``prob`` is not between 0 and 1.
        """
        return summarize(self._started(), self.diagnostics(), prob)

    def print_summary(self, prob: float = 0.9) -> None:
        """Print :meth:`summary`, with the verdict below the table.

        The columns of Pyro and NumPyro are there: ``sd`` is their ``std``,
        ``bulk_ess`` their ``n_eff``.

        Args:
            prob: Of the central interval.

        Raises:
            RuntimeError: If nothing was run.
            ValueError: If ``prob`` is not between 0 and 1.
        """
        print(self.summary(prob))

    def to_arviz(self, *, log_likelihood: bool = True) -> Any:
        """The run as an ``arviz.InferenceData``, or as a ``DataTree`` from ArviZ 1 on.

        With statistics of the sampler and of the warm-up, and of a Pyro model its
        deterministic sites, its data and the log-likelihood of each observation, shape
        ``(num_chains, num_draws, *batch_shape)``. These three are found by running the
        model at the draws; where it has discrete latent sites or plates that subsample
        there are only the data.

        There is no ``energy`` among the statistics, which ArviZ takes for the total
        energy with momenta; :meth:`diagnostics` has the ``energy_bfmi``.

        Args:
            log_likelihood: Whether to run a Pyro model at the draws. The result has as
                many numbers as there are draws times observations.

        Raises:
            ImportError: If ArviZ is not installed.
            RuntimeError: If nothing was run, or the draws were not kept.
            ValueError: If a site has the name of one of ArviZ's own dimensions.
        """
        run = self._started()
        try:
            import arviz
        except ImportError as error:
            message = "to_arviz needs ArviZ: pip install 'pyro-ebm[arviz]'."
            raise ImportError(message) from error
        if not isinstance(run.draws, KeptDraws):
            raise RuntimeError(
                "to_arviz needs the draws, and keep_draws is False. Use summary(), or "
                "run with keep_draws=True."
            )
        samples = run.samples()
        groups = {"posterior": samples}
        if log_likelihood:
            groups = _with_outputs(run, samples)
        _check_names(groups["posterior"])
        arrays = {
            group: {name: value.detach().cpu().numpy() for name, value in part.items()}
            for group, part in (groups | _statistics(run, run.draws)).items()
            if part
        }
        with warnings.catch_warnings():
            # It takes many chains of few draws for a slip.
            warnings.filterwarnings("ignore", "More chains|Found chain", UserWarning)
            return _from_dict(arviz, arrays)

    def _by_site(self, values: dict[str, Any]) -> Any:
        if self._started().target.is_model:
            return values
        (value,) = values.values()
        return value

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly, draws and random numbers included.

        The target is not in it; :meth:`resume` takes it.

        Raises:
            RuntimeError: If nothing was run.
        """
        return {"settings": self._settings(), "run": self._started().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the run that :meth:`state_dict` left; :meth:`resume` goes on.

        Args:
            state: From an object with the same settings, of which ``num_samples``,
                ``initial``, ``progress_bar`` and ``compile`` may differ.

        Raises:
            ValueError: If these differ.
        """
        for name, own in self._settings().items():
            if state["settings"].get(name) != own:
                raise ValueError(
                    f"{name} must be that of the saved run, "
                    f"{state['settings'].get(name)!r}, got {own!r}."
                )
        self._saved, self._run, self._diagnostics = state, None, None

    def _settings(self) -> dict[str, Any]:
        return {
            "kernel": _describe(self.kernel),
            "num_chains": self.num_chains,
            "thinning": self.thinning,
            "keep_draws": self.keep_draws,
            "dtype": self.dtype,
        }


def _describe(kernel: Any) -> str:
    """The kernel with its settings, but for tensors, which the state dict holds."""
    if kernel is None:
        return "default"
    settings = {f.name: getattr(kernel, f.name) for f in dataclasses.fields(kernel)}
    plain = {k: v for k, v in settings.items() if not isinstance(v, Tensor)}
    inside = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    return f"{type(kernel).__name__}({inside})"


# Groups of an export to ArviZ ------------------------------------------------------


def _from_dict(arviz: Any, groups: dict[str, dict[str, Any]]) -> Any:
    """ArviZ 1 takes the groups as one argument, ArviZ 0 each as its own."""
    saves = {"save_warmup": any(name.startswith("warmup") for name in groups)}
    if "posterior" in inspect.signature(arviz.from_dict).parameters:
        return arviz.from_dict(**groups, **saves)
    return arviz.from_dict(groups, **saves)


def _with_outputs(
    run: ChainRun, samples: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Groups of a Pyro model, its deterministic sites among the draws."""
    model = run.target.model
    num_chains, num_draws = next(iter(samples.values())).shape[:2]
    if model is None or not num_draws:
        return {"posterior": samples}
    found = model.outputs({name: v.flatten(0, 1) for name, v in samples.items()})
    deterministic, log_likelihood = (
        {name: v.unflatten(0, (num_chains, num_draws)) for name, v in part.items()}
        for part in (found.deterministic, found.log_likelihood)
    )
    return {
        "posterior": samples | deterministic,
        "log_likelihood": log_likelihood,
        "observed_data": found.observed,
    }


def _statistics(run: ChainRun, draws: KeptDraws) -> dict[str, dict[str, Tensor]]:
    statistics = {
        "acceptance_rate": draws["accept_prob"],
        "diverging": draws["divergent"],
        "lp": -draws["energy"],
        "potential_energy": draws["energy"],
        "step_size": step_size_of(run.warmup.kernel).expand_as(draws["energy"]),
    }
    groups = {"sample_stats": _by_chain(statistics)}
    if run.warmup_accept_probs:
        accept_prob = torch.stack(run.warmup_accept_probs)
        step_sizes = torch.stack(run.warmup_step_sizes)
        groups["warmup_sample_stats"] = _by_chain(
            {
                "acceptance_rate": accept_prob,
                "diverging": accept_prob == 0,
                "step_size": step_sizes[:, None].expand_as(accept_prob),
            }
        )
    return groups


def _check_names(samples: dict[str, Tensor]) -> None:
    taken = sorted({"chain", "draw"} & samples.keys())
    if taken:
        raise ValueError(
            f"sites must not be called {taken} in ArviZ, which would drop them for its "
            "dimensions of that name. Rename them in the model, or build the object "
            "from get_samples(group_by_chain=True)."
        )


def _by_chain(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """``(num_draws, num_chains)`` tensors as ``(num_chains, num_draws)`` ones."""
    return {name: v.transpose(0, 1) for name, v in statistics.items()}
