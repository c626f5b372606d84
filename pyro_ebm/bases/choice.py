"""The base that gives held-out rows the largest likelihood."""

__all__ = ["FittedBase", "fit"]

import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.flow import flow
from pyro_ebm.bases.marginals import independent
from pyro_ebm.bases.mixture import gaussian_mixture, normal
from pyro_ebm.bases.rows import Rows, split

_Fitter = Callable[[Tensor, float], dist.TorchDistribution]
#: Rows from which on a flow is tried.
_ENOUGH_FOR_FLOW = 500
#: Nats a row by which a simpler kind may be worse.
_EQUAL = 1e-3


class FittedBase(NamedTuple):
    """What :func:`fit` found.

    Attributes:
        distribution: Normalised, over the event, fitted to all rows.
        kind: ``"normal"``, ``"gaussian_mixture"``, ``"independent"`` or ``"flow"``.
        log_likelihood: Nats a held-out row, of the fit to the other rows.
        std_error: Of that, from the number of held-out rows.
        compared: The same of all kinds that were tried; ``-inf`` where a fit failed.
    """

    distribution: dist.TorchDistribution
    kind: str
    log_likelihood: float
    std_error: float
    compared: dict[str, float]

    def __str__(self) -> str:
        """The kind, its likelihood and the others'."""
        others = ", ".join(
            f"{kind} {value:.3f}"
            for kind, value in sorted(self.compared.items(), key=lambda pair: -pair[1])
            if kind != self.kind
        )
        found = f"{self.kind}: {self.log_likelihood:.3f} +- {self.std_error:.2g}"
        return f"{found} nats a held-out row" + (f" ({others})" if others else "")


def fit(
    data: Tensor,
    kind: str = "auto",
    *,
    support: Constraint | None = None,
    max_seconds: float = 20.0,
    seed: int = 0,
    progress_bar: bool = True,
) -> FittedBase:
    """Fit a base to data, by what held-out rows say.

    Args:
        data: Shape ``(N, *event)``; of an integer type for a finite support, whose
            coordinates are then independent.
        kind: ``"auto"`` compares a normal distribution, a mixture of them, independent
            kernel densities and, for 500 rows or more and where zuko is installed, a
            spline flow; or the one to take.
        support: Of a row; default: all real numbers.
        max_seconds: Seconds for the flow, which is given up where they are over.
        seed: Of the held-out rows, and of the fits.
        progress_bar: Whether to show the steps of the flow.

    Returns:
        The base, and what was compared.

    Raises:
        ImportError: If what ``kind`` needs is not installed.
        ValueError: If ``kind`` is none of these, or the data do not fit, see
            :class:`~pyro_ebm.bases.rows.Rows`.

    Exactness: the held-out likelihood is *unbiased* for a kind that was asked for; of
    ``"auto"`` it is that of the best, and a little too good.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> data = torch.cat([torch.randn(150, 2) - 4, torch.randn(150, 2) + 4])
        >>> found = fit(data, progress_bar=False)
        >>> found.kind, list(found.compared)
        ('gaussian_mixture', ['normal', 'gaussian_mixture', 'independent'])
        >>> model = pyro_ebm.EnergyModel(
        ...     pyro_ebm.energies.NeuralEnergy((2,), (16,)), found.distribution
        ... )
    """
    is_whole = isinstance(data, Tensor) and not data.is_floating_point()
    if not is_whole:
        Rows.of(data, support)
    fitters = _fitters(support, seed, progress_bar=progress_bar)
    if kind != "auto" and kind not in fitters:
        raise ValueError(f"kind must be 'auto' or one of {[*fitters]}, got {kind!r}.")
    wanted = [kind]
    if kind == "auto":
        wanted = ["independent"] if is_whole else _worth_trying(len(data))
    train, held_out = split(data, seed)
    start, compared, scores = time.monotonic(), {}, {}
    for name in wanted:
        left = max(max_seconds / 2 - (time.monotonic() - start), 1.0)
        try:
            scores[name] = fitters[name](train, left).log_prob(held_out)
        except (ArithmeticError, ValueError):  # no covariance, say
            if kind != "auto":
                raise
            scores[name] = torch.tensor([-math.inf])
        compared[name] = scores[name].mean().nan_to_num(-math.inf).item()
    most = max(compared.values())
    best = next(name for name in wanted if compared[name] >= most - _EQUAL)
    left = max(max_seconds - (time.monotonic() - start), 1.0)
    values = scores[best]
    std_error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return FittedBase(
        fitters[best](data, left), best, compared[best], std_error, compared
    )


def _worth_trying(num_rows: int) -> list[str]:
    kinds = ["normal", "independent"]
    if find_spec("sklearn") is not None:
        kinds.insert(1, "gaussian_mixture")
    if num_rows >= _ENOUGH_FOR_FLOW and find_spec("zuko") is not None:
        kinds.append("flow")
    return kinds


def _fitters(
    support: Constraint | None, seed: int, *, progress_bar: bool
) -> dict[str, _Fitter]:
    return {
        "normal": lambda data, _: normal(data, support=support),
        "gaussian_mixture": lambda data, _: gaussian_mixture(
            data, support=support, seed=seed
        ),
        "independent": lambda data, _: independent(data, support=support, seed=seed),
        "flow": lambda data, seconds: flow(
            data,
            support=support,
            max_seconds=seconds,
            seed=seed,
            progress_bar=progress_bar,
        ),
    }
