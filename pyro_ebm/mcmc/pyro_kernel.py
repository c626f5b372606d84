"""A kernel of this package inside ``pyro.infer.MCMC``."""

__all__ = ["PyroKernel"]

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, final

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pyro_ebm.energies import Energy, FunctionEnergy
from pyro_ebm.mcmc.base import Kernel, StepInfo, replace_nonfinite
from pyro_ebm.mcmc.warmup.adaptation import StepSizeAdaptation, find_step_size


@final
class PyroKernel(MCMCKernel):
    """Run a kernel on a Pyro model or a potential, one chain at a time.

    For many chains at once prefer the kernel itself; this adapter lets it stand where
    Pyro's HMC and NUTS stand: ``pyro.infer.MCMC(PyroKernel(MALA(), model), ...)``, with
    several chains and their ``initial_params`` too.

    Args:
        kernel: Any kernel of :mod:`pyro_ebm.mcmc`.
        model: A Pyro model with continuous latent sites; its arguments are given to
            ``MCMC.run``.
        potential_fn: In place of a model: minus the log density of a dict of values in
            unconstrained space, in nats, shape ``()``. It needs the ``initial_params``
            of ``pyro.infer.MCMC``.
        transforms: From the support of a site to unconstrained space, by name; default:
            those of the supports of a model, none of a potential.
        init_strategy: Where sites of a model start, as for autoguides.

    Raises:
        TypeError: If ``model`` is an energy or cannot be called, or ``potential_fn``
            cannot.
        ValueError: If not one of ``model`` and ``potential_fn`` is given.

    Example:
        >>> def model():
        ...     return pyro.sample("x", dist.Gamma(2.0, 1.0))
        >>> kernel = PyroKernel(pyro_ebm.mcmc.HMC(num_leapfrog=2), model)
        >>> chain = pyro.infer.MCMC(kernel, 20, 10, disable_progbar=True)
        >>> chain.run()
        >>> chain.get_samples()["x"].shape
        torch.Size([20])
    """

    def __init__(
        self,
        kernel: Kernel,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        transforms: dict[str, Any] | None = None,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError(
                "exactly one of model and potential_fn must be given, got "
                + ("neither." if model is None else "both.")
            )
        if model is not None and (isinstance(model, Energy) or not callable(model)):
            raise TypeError(
                f"model must be a Pyro model, got {type(model).__name__}. An energy "
                'becomes one as lambda: pyro.sample("x", EnergyDistribution(energy)).'
            )
        if potential_fn is not None and not callable(potential_fn):
            raise TypeError(
                "potential_fn must map a dict of unconstrained values to an energy, "
                f"got {type(potential_fn).__name__}."
            )
        self.kernel = kernel
        self.model = model
        self.potential_fn = potential_fn
        self.init_strategy = init_strategy
        # Those of the last run, which pyro.infer.MCMC asks for, or else as given.
        self.transforms, self._given_transforms = transforms, transforms
        self._initial_params: dict[str, Tensor] | None = None

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Find the latent sites, a starting point and a step size.

        Raises:
            ValueError: If the model has no latent site, or a potential is given no
                starting point.
            DivergenceError: If the starting point that was given has a non-finite
                energy.
        """
        self._warmup_steps, self._step = warmup_steps, 0
        self._accept_sum, self._num_nonfinite = 0.0, 0
        initial, potential = self._found(args, kwargs)
        if not initial:
            raise ValueError(
                "model must have at least one continuous latent site, got none: all "
                "its sites are observed or discrete."
            )
        self._shapes = OrderedDict((k, v.shape) for k, v in sorted(initial.items()))
        self._initial_params = initial
        size = sum(math.prod(shape) for shape in self._shapes.values())
        # One chain: the potential takes no batch, so a batch of one is unpacked.
        self._energy = FunctionEnergy(
            lambda u: potential(self._unflatten(u)).reshape(1), (size,)
        )
        state = self.kernel.init(self._energy, self._flatten(initial))
        self._state = replace_nonfinite(state)
        start = find_step_size(self.kernel, self._energy, self._state)
        self._adaptation = StepSizeAdaptation(start)
        self._adapted = dataclasses.replace(self.kernel, step_size=start)

    def _found(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
        """Where the chain starts, and its potential."""
        if self.potential_fn is not None:
            if self._initial_params is None:
                raise ValueError(
                    "initial_params must be given with a potential_fn: "
                    "pyro.infer.MCMC(kernel, ..., initial_params={site: value})."
                )
            self.transforms = self._given_transforms or {}
            return self._initial_params, self.potential_fn
        initial, potential, self.transforms, _ = initialize_model(
            self.model,
            model_args=args,
            model_kwargs=kwargs,
            transforms=self._given_transforms,
            init_strategy=self.init_strategy,
            initial_params=self._initial_params,
        )
        return initial, potential

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """Where the chain starts, unconstrained; if None, ``setup`` finds it."""
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor] | None) -> None:
        self._initial_params = params

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition from ``params``, in unconstrained space."""
        u = self._flatten(params)
        if not torch.equal(u, self._state.x):
            self._state = self.kernel.init(self._energy, u)
        self._state, info = self._adapted.step(self._energy, self._state)
        self._learn(info)
        return self._unflatten(self._state.x)

    def logging(self) -> OrderedDict[str, str]:
        """Step size and mean acceptance, for Pyro's progress bar."""
        return OrderedDict(
            [
                ("step size", f"{float(self._adapted.step_size):.2e}"),
                ("acc. prob", f"{self._accept_rate:.3f}"),
            ]
        )

    def diagnostics(self) -> dict[str, float]:
        """Mean acceptance probability and non-finite proposals, both after warmup."""
        return {
            "acceptance rate": self._accept_rate,
            "non-finite proposals": self._num_nonfinite,
        }

    def cleanup(self) -> None:
        """Forget the starting point, as Pyro's kernels do, for another run."""
        self._initial_params = None

    @property
    def _accept_rate(self) -> float:
        counted = self._step - self._warmup_steps  # during warmup all that there are
        return self._accept_sum / max(counted if counted > 0 else self._step, 1)

    def _learn(self, info: StepInfo) -> None:
        self._step += 1
        self._accept_sum += info.accept_prob.item()
        self._num_nonfinite += int(not info.is_finite)
        if self._step > self._warmup_steps:
            return
        adaptation = self._adaptation
        adaptation.update(self.kernel, info)
        step_size = adaptation.step_size
        if self._step == self._warmup_steps:
            step_size = adaptation.averaged_step_size
            self._accept_sum, self._num_nonfinite = 0.0, 0
        self._adapted = dataclasses.replace(self.kernel, step_size=step_size)

    def _flatten(self, params: dict[str, Tensor]) -> Tensor:
        return torch.cat([params[k].detach().reshape(-1) for k in self._shapes])[None]

    def _unflatten(self, u: Tensor) -> dict[str, Tensor]:
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = u[0].split(sizes)
        pairs = zip(self._shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in pairs}
