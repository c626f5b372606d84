"""The base that gives held-out rows the largest likelihood."""

__all__ = ["FittedBase", "fit"]

import math
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.committee import committee
from pyro_ebm.bases.conditional import as_mixture, conditional_draws
from pyro_ebm.bases.flow import flow
from pyro_ebm.bases.kernels import independent, kernel_density
from pyro_ebm.bases.mixed import stacked_classes
from pyro_ebm.bases.mixture import gaussian_mixture, normal
from pyro_ebm.bases.rows import Rows, split
from pyro_ebm.bases.stack import Stack, stacked
from pyro_ebm.core.spaces import MixedSupport, of_columns
from pyro_ebm.core.stopwatch import Stopwatch

_Fitter = Callable[[Tensor, float], dist.TorchDistribution]
#: Rows of which one can be held out; and from which on a flow is tried, in all and for
#: each column.
_FEWEST = 3
_ENOUGH_FOR_FLOW, _EACH_FOR_FLOW = 500, 50
#: Rows from which on a flow gets as much time as a committee.
_MANY = 5000
#: Nats a row by which a simpler kind may be worse, and a mixture must be better.
_EQUAL, _WORTH = 1e-3, 0.01


class FittedBase(NamedTuple):
    """What :func:`fit` found.

    Attributes:
        distribution: Normalised, over the event.
        kind: ``"normal"``, ``"committee"``, ``"kernel_density"``, ``"independent"``,
            ``"flow"``, ``"gaussian_mixture"``, or ``"stack"``, a mixture of them; of a
            table with categorical columns ``"latent_classes"``.
        log_likelihood: Nats a held-out row, of the fit to the other rows.
        std_error: Of that, from the number of held-out rows.
        compared: The same of all kinds that were tried; ``-inf`` where a fit failed.
        shares: Weights of the kinds in the distribution; empty where it cannot be
            fitted once more, to other rows.
    """

    distribution: dist.TorchDistribution
    kind: str
    log_likelihood: float
    std_error: float
    compared: dict[str, float]
    shares: dict[str, float] = {}

    def fitted_to(
        self,
        data: Tensor,
        *,
        support: Constraint | None = None,
        max_seconds: float = 20.0,
        seed: int = 0,
        progress_bar: bool = True,
    ) -> dist.TorchDistribution:
        """The same kinds with the same weights, fitted to other rows.

        Args:
            data: Shape ``(N, *event)``; as for :func:`fit`, and so are the others.
            support: Of a row.
            max_seconds: Seconds for all kinds.
            seed: Of the fits.
            progress_bar: Whether to show the steps of a flow.

        Raises:
            ArithmeticError: If a kind cannot be fitted to the rows.
            ValueError: Likewise; or if there are no shares.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> found = fit(torch.randn(100, 2), "normal")
            >>> found.fitted_to(torch.randn(100, 2) + 9).loc.round()
            tensor([9., 9.])
        """
        fitters = _fitters(support, seed, progress_bar=progress_bar)
        parts = _fitted(fitters, [*self.shares], data, max_seconds, skip=False)
        if len(parts) == 1:
            return next(iter(parts.values()))
        like = data if data.is_floating_point() else torch.empty(0)
        return Stack([*parts.values()], torch.tensor([*self.shares.values()]).to(like))

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
    held_out: Tensor | None = None,
    max_seconds: float = 20.0,
    seed: int = 0,
    progress_bar: bool = True,
) -> FittedBase:
    """Fit a base to data, by what held-out rows say.

    Args:
        data: Shape ``(N, *event)``; of an integer type for a finite support, whose
            coordinates are then independent. Of vectors of real numbers, where
            ``held_out`` is given, ``nan`` is an entry that is missing: the committee is
            fitted to what was seen, the others to rows whose missing entries are drawn
            from its conditional.
        kind: ``"auto"`` compares a normal distribution, a committee of mixtures of
            them (:func:`~pyro_ebm.bases.committee`), kernel densities of rows and of
            independent coordinates and, where zuko is installed, from 500 rows and 50
            a column on, a spline flow, and mixes those that are worth it; or the one
            to take. Of a table with real and categorical columns it is
            :func:`~pyro_ebm.bases.latent_classes`.
        support: Of a row; default: all real numbers. With ``constraints.cat`` some
            columns may be categorical.
        held_out: Rows to compare by, shape ``(M, *event)``; the base is then fitted to
            ``data`` alone. Default: about a seventh of ``data``, and what was chosen is
            fitted once more, to all rows.
        max_seconds: Seconds for all fits: the committee stops at larger mixtures, and
            the flow is given up, where they are over.
        seed: Of the held-out rows, and of the fits.
        progress_bar: Whether to show the steps of the flow.

    Returns:
        The base, and what was compared.

    Raises:
        ImportError: If what ``kind`` needs is not installed.
        ValueError: If ``kind`` is none of these, there are fewer than three rows, or
            they do not fit, see :class:`~pyro_ebm.bases.rows.Rows`.

    Exactness: the held-out likelihood is *unbiased* for a kind that was asked for; of
    ``"auto"`` it is that of the best, and a little too good.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> data = torch.cat([torch.randn(150, 2) - 4, torch.randn(150, 2) + 4])
        >>> found = fit(data, progress_bar=False)
        >>> found.kind, len(found.compared)
        ('committee', 5)
        >>> model = pyro_ebm.EnergyModel(
        ...     pyro_ebm.energies.NeuralEnergy((2,), (16,)), found.distribution
        ... )
    """
    support = _plain(support, data)
    if isinstance(support, MixedSupport):
        return _fit_mixed(data, kind, support, held_out, max_seconds, seed)
    is_whole = isinstance(data, Tensor) and not data.is_floating_point()
    is_incomplete = held_out is not None and support is None and _lacks_entries(data)
    if not (is_whole or is_incomplete):
        Rows.of(data, support)
    fitters = _fitters(support, seed, progress_bar=progress_bar)
    _check(data, held_out, kind, fitters)
    wanted = _worth_trying(data) if kind == "auto" else [kind]
    if is_incomplete:  # the others are fitted to rows that it has filled
        wanted = sorted(wanted, key=lambda name: name != "committee")
    train, apart = split(data, seed) if held_out is None else (data, held_out)
    seconds = max_seconds / 2 if held_out is None else max_seconds
    fitted = _fitted(fitters, wanted, train, seconds, skip=kind == "auto")
    found = _best_of(fitted, wanted, apart)
    if held_out is not None:
        return found
    limits: Any = {"max_seconds": seconds, "seed": seed, "progress_bar": progress_bar}
    return found._replace(distribution=found.fitted_to(data, support=support, **limits))


def _best_of(
    fitted: dict[str, dist.TorchDistribution], wanted: list[str], apart: Tensor
) -> FittedBase:
    """The one of the largest likelihood at other rows, or a mixture of several.

    Args:
        fitted: By their kinds.
        wanted: All kinds that were tried, the simplest first.
        apart: Shape ``(M, *event)``.
    """
    scores = {name: base.log_prob(apart).detach() for name, base in fitted.items()}
    compared = {
        name: _mean(scores[name]) if name in scores else -math.inf for name in wanted
    }
    best = max(fitted, key=lambda name: compared[name] - _EQUAL * wanted.index(name))
    chosen, shares = fitted[best], {best: 1.0}
    if len(fitted) > 1:
        mixture = stacked(list(fitted.values()), apart)
        scores["stack"] = mixture.log_prob(apart)
        compared["stack"] = _mean(scores["stack"])
        if _is_better(scores["stack"] - scores[best]):
            best, chosen = "stack", mixture
            names = [k for k, base in fitted.items() if base in mixture.parts]
            shares = dict(zip(names, mixture.probs.tolist(), strict=True))
    error = _error(scores[best])
    return FittedBase(chosen, best, compared[best], error, compared, shares)


def _fit_mixed(
    data: Tensor,
    kind: str,
    support: MixedSupport,
    held_out: Tensor | None,
    max_seconds: float,
    seed: int,
) -> FittedBase:
    """Latent classes, the one kind for tables with real and categorical columns."""
    name = "latent_classes"
    _check(data, held_out, kind, [name])
    base, scores = stacked_classes(data, support, None, held_out, max_seconds, seed)
    value = _mean(scores)
    return FittedBase(base, name, value, _error(scores), {name: value})


def _lacks_entries(data: Tensor) -> bool:
    """Whether rows of numbers have some that are ``nan``."""
    is_real = isinstance(data, Tensor) and data.is_floating_point() and data.dim() == 2
    return is_real and bool(data.isnan().any())


def _error(values: Tensor) -> float:
    number = len(values)
    return values.std().item() / math.sqrt(number) if number > 1 else 0.0


def _check(
    data: Tensor, held_out: Tensor | None, kind: str, kinds: Collection[str]
) -> None:
    if kind != "auto" and kind not in kinds:
        raise ValueError(f"kind must be 'auto' or one of {[*kinds]}, got {kind!r}.")
    if held_out is None and len(data) < _FEWEST:
        raise ValueError(
            f"data must have at least {_FEWEST} rows to compare bases by, got "
            f"{len(data)}. Build one yourself, pyro_ebm.bases.normal(data) say."
        )


def _is_better(gains: Tensor) -> bool:
    """Whether gains at held-out rows are worth it, and hardly chance."""
    gains = gains.nan_to_num(0.0)
    error = gains.std().item() / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return gains.mean().item() > max(_WORTH, error)


def _mean(scores: Tensor) -> float:
    return scores.mean().nan_to_num(-math.inf).item()


def _fitted(
    fitters: dict[str, _Fitter],
    wanted: Sequence[str],
    rows: Tensor,
    seconds: float,
    *,
    skip: bool,
) -> dict[str, dist.TorchDistribution]:
    """What could be fitted, by kind; what fails is left out or raised."""
    watch, found = Stopwatch(), dict[str, dist.TorchDistribution]()
    for name in wanted:
        if "committee" in found and _lacks_entries(rows):
            rows = conditional_draws(
                as_mixture(found["committee"]), rows, rows.isnan(), 1
            )[0]
        left = max(seconds - watch.seconds, 1.0)
        try:
            found[name] = fitters[name](rows, left)
        except (ArithmeticError, ValueError):  # no covariance, say
            if not skip:
                raise
    if not found:
        raise ValueError(
            f"data of shape {tuple(rows.shape)} could be fitted by none of {wanted}."
        )
    return found


def _plain(support: Constraint | None, data: Tensor) -> Constraint | None:
    """A support that names columns by ``constraints.cat`` in the form of an energy."""
    if support is None or not isinstance(data, Tensor):
        return support
    return of_columns(support, data.shape[1:])


def _worth_trying(data: Tensor) -> list[str]:
    if not data.is_floating_point():
        return ["independent"]
    enough = max(_ENOUGH_FOR_FLOW, _EACH_FOR_FLOW * data[0].numel())
    kinds = ["normal", "kernel_density", "independent"]
    if find_spec("sklearn") is not None:
        kinds.insert(1, "committee")
    if len(data) >= enough and find_spec("zuko") is not None:
        kinds.append("flow")
    return kinds


def _share(data: Tensor) -> float:
    """Of the time that is for the committee; a flow needs the more, the more rows."""
    return 0.5 if len(data) > _MANY else 0.75


def _fitters(
    support: Constraint | None, seed: int, *, progress_bar: bool
) -> dict[str, _Fitter]:
    return {
        "normal": lambda data, _: normal(data, support=support),
        "gaussian_mixture": lambda data, _: gaussian_mixture(
            data, support=support, seed=seed
        ),
        "kernel_density": lambda data, _: kernel_density(
            data, support=support, seed=seed
        ),
        "committee": lambda data, seconds: committee(
            data, support=support, max_seconds=_share(data) * seconds, seed=seed
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
