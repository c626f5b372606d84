r"""Starting points of many chains, in groups that share a point.

On a Pyro model the points are overdispersed draws around normal approximations that
descents from arbitrary points have led to (:mod:`pyro_ebm.mcmc.starts.modes`), one
a group, and the kernel starts in the metric of these.

Normal sites with a latent scale are standardised where that suits the data better.
Chains that have just started tell which coordinates suit them, long before they have
mixed: with their draws :math:`v` and the gradients there,

.. math::
    s = \tfrac12 \sum_i \log\left(\mathrm{Var}\, v_i\,
        \mathrm{Var}\, \partial_i f_v\right)                               \tag{1}

is 0 for independent normal coordinates, and grows with the Fisher divergence from them
that the best diagonal metric leaves. Draws of the model in standardised coordinates are
the same draws, so that (1) needs no chains in these.

References:
    Gorinova, Moore & Hoffman (2020), ICML, PMLR 119, 3648-3657.
    Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845.
"""

__all__ = ["Start", "choose_non_centred", "start_chains"]

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.energies.pyro_model.non_centred import NonCentring, sites_to_standardise
from pyro_ebm.energies.views.pointwise import check_pointwise
from pyro_ebm.mcmc.base import ChainState, Kernel, far_limit, replace_nonfinite
from pyro_ebm.mcmc.kernels.metric import (
    MAX_DENSE,
    Factor,
    LowRank,
    dense_metric,
    diagonal_metrics,
    low_rank_metric,
    steepness_weights,
    times_scale,
    typical,
)
from pyro_ebm.mcmc.run.target import ChainKernel, ChainTarget
from pyro_ebm.mcmc.starts.modes import Approximations, ValueAndGrad, find_approximations
from pyro_ebm.mcmc.warmup.warmup import Warmup

#: From so many chains on they start in groups.
_MANY = 64
#: Groups that are wanted, at least and at most; Margossian et al. (2024) use 16.
_GROUPS = (8, 16)
#: Degrees of freedom of the draws that chains start at.
_DEGREES = 5
#: Settings of a kernel that are its metric.
_METRIC = ("scale", "scale_tril", "low_rank")
#: Draws that are tried, each half as far from the mean as the one before.
_NUM_TRIES = 6
#: Transitions of the chains that tell; the later half are looked at.
_NUM_STEPS = 40
#: Sites to choose from, beyond which those of a loop, as ``x_1``, ``x_2``, are one.
_MAX_SITES = 8
#: What (1) must fall by for each coordinate of a site.
_GAIN = 0.1


class Start(NamedTuple):
    """Starting points of chains, with the metric to begin with.

    Attributes:
        state: Where they are.
        num_groups: Groups of chains side by side at the same point.
        kernel: What moves them, in the metric that was found.
        num_moved: Chains whose own descent ended in a place of no mass, and which
            start where others do.
    """

    state: ChainState
    num_groups: int
    kernel: ChainKernel
    num_moved: int


def start_chains(
    target: ChainTarget,
    kernel: ChainKernel,
    num_chains: int,
    initial: Any = None,
    *,
    is_adapted: bool = True,
) -> Start:
    """Place the chains.

    Args:
        target: What they run on.
        kernel: What will move them.
        num_chains: ``C``.
        initial: ``K`` points of the support, ``K`` a divisor of ``C``; each is where
            ``C / K`` chains side by side start. Default: the target's own, which for a
            Pyro model only begin the search for better ones.
        is_adapted: Whether there will be a warm-up; if not, nothing is searched for.

    Returns:
        The chains. Groups at points of non-finite energy or gradient start where
        randomly chosen others do.

    Raises:
        ValueError: If ``initial`` has another shape, or a number of points that does
            not divide that of the chains.
        DivergenceError: If energy and gradient are finite at no point.
    """
    num_moved = 0
    if initial is None:
        num_groups = _num_groups(num_chains)
        size = num_chains // num_groups
        # As many as chains: another batch size may have to be traced anew.
        points = target.start(num_chains)
        if target.energy.support.is_discrete:  # of which much may be forbidden
            is_lost = ~target.energy(points).isfinite()
            points = points[is_lost.long().argsort(stable=True)][:num_groups]
        else:
            points = points[::size]
        if is_adapted and target.is_model and isinstance(kernel, Kernel):
            points, kernel, num_moved = _found(target, kernel, points, num_chains)
    else:
        points = _checked(target, initial, num_chains)
        num_groups = len(points)
        size = num_chains // num_groups
    if not target.is_model and len(points) > 1:
        check_pointwise(target.energy, points)
    state = kernel.init(target.energy, points.repeat_interleave(size, 0))
    groups = ChainState(*(value[::size] for value in state))
    if target.energy.support.is_discrete:  # where gradients may be missing
        groups = groups._replace(grad=torch.zeros_like(groups.x))
        x = replace_nonfinite(groups).x.repeat_interleave(size, 0)
        return Start(kernel.init(target.energy, x), num_groups, kernel, 0)
    groups = replace_nonfinite(groups)
    state = ChainState(*(v.repeat_interleave(size, 0) for v in groups))
    return Start(state, num_groups, kernel, num_moved * size)


def _found(
    target: ChainTarget, kernel: Kernel, points: Tensor, num_chains: int
) -> tuple[Tensor, Kernel, int]:
    """Points near the mass, the kernel in a metric, and groups that were moved."""

    def value_and_grad(x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = target.energy.value_and_grad(x.to(points.dtype))
        return value.double(), grad.double()

    found = find_approximations(value_and_grad, points.double(), num_chains)
    limit = far_limit(points.shape[1])
    is_good = found.bound > found.bound.max() - limit
    if not is_good.any():
        return points, kernel, 0
    metric = _metric(found, is_good)
    own = torch.arange(len(points), device=points.device)
    others = is_good.double().multinomial(len(points), replacement=True)
    source = torch.where(is_good, own, others)
    x = _overdispersed(value_and_grad, found, source, metric, num_chains)
    scale, factor, _ = metric
    names = {field.name for field in dataclasses.fields(kernel)}
    if all(getattr(kernel, name, None) is None for name in _METRIC):
        kind = "low_rank" if isinstance(factor, LowRank) else "scale_tril"
        if factor is not None and kind in names:
            kernel = dataclasses.replace(kernel, **{kind: factor.to(points)})
        elif "scale" in names:
            kernel = dataclasses.replace(kernel, scale=scale.to(points))
    return x.to(points), kernel, int((~is_good).sum())


class _Metric(NamedTuple):
    """What is in common of good approximations: a scale, and if it helps a matrix.

    Attributes:
        scale: Shape ``(D,)``.
        factor: Lower-triangular, shape ``(D, D)``, or of low rank, or ``None``.
        sizes: Of each approximation in that metric, shape ``(K,)``.
    """

    scale: Tensor
    factor: Factor | None
    sizes: Tensor


def _metric(found: Approximations, is_good: Tensor) -> _Metric:
    """By the draws of the good approximations, and the gradients there."""
    is_finite = found.energy.isfinite() & found.grad.isfinite().all(-1)
    size = found.x.shape[-1]

    def centred(rows: Tensor, weights: Tensor) -> Tensor:
        """Times the root of the weights; a draw without density has none."""
        weights = torch.where(is_finite, weights, 0.0)[..., None]
        rows = torch.where(weights > 0, rows, 0.0)
        total = weights.sum(1, keepdim=True).clamp(min=1e-300)
        return (rows - (weights * rows).sum(1, keepdim=True) / total) * weights.sqrt()

    ones = torch.ones_like(found.energy)
    x, grad = centred(found.x, ones), centred(found.grad, ones)
    scales = diagonal_metrics(x.square().mean(1), grad.square().mean(1))
    scale = typical(scales[is_good]).nan_to_num(1.0)
    weights = torch.stack(list(map(steepness_weights, grad * scale)))
    x, grad = centred(found.x, weights), centred(found.grad, weights)
    scales = diagonal_metrics(x.square().mean(1), grad.square().mean(1))
    scale = typical(scales[is_good]).nan_to_num(1.0)
    sizes = (scales / scale).log().mean(1).exp()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    x, grad = x[is_good], grad[is_good]
    if size > MAX_DENSE:
        return _Metric(scale, low_rank_metric(x, grad, scale), sizes)
    if size > x.shape[1]:  # too few of each: the paths together
        x, grad = x.reshape(1, -1, size), grad.reshape(1, -1, size)
    covariance, grads = (part.mT @ part / part.shape[1] for part in (x, grad))
    return _Metric(scale, dense_metric(covariance, grads, scale), sizes)


def _overdispersed(
    value_and_grad: ValueAndGrad,
    found: Approximations,
    source: Tensor,
    metric: _Metric,
    num_chains: int,
) -> Tensor:
    """Student draws around the means of some paths, where the energy is not absurd."""
    loc = found.loc[source]
    usual = found.energy.where(found.energy.isfinite(), torch.inf).median(1).values
    highest = usual[source] + far_limit(loc.shape[1])
    noise = torch.randn_like(loc)
    chi2 = torch.randn(len(loc), _DEGREES).to(loc).square().mean(1, keepdim=True)
    t = metric.sizes[source][:, None] * noise / chi2.sqrt()
    step = t * metric.scale if metric.factor is None else times_scale(t, metric.factor)
    # The best of the draws, where no Student draw will do.
    energy = found.energy[source].nan_to_num(torch.inf, torch.inf)
    rows = torch.arange(len(loc), device=loc.device)
    x = found.x[source][rows, energy.argmin(1)]
    is_open = torch.ones_like(highest, dtype=torch.bool)
    size = num_chains // len(loc)
    for _ in range(_NUM_TRIES):
        trial = loc + step
        value, grad = value_and_grad(trial.repeat_interleave(size, 0))
        is_taken = (value[::size] < highest) & grad[::size].isfinite().all(-1) & is_open
        x = torch.where(is_taken[:, None], trial, x)
        is_open = is_open & ~is_taken
        step = step / 2
    return x


def _num_groups(num_chains: int) -> int:
    if num_chains < _MANY:
        return num_chains
    low, high = _GROUPS
    divisors = [k for k in range(low, high + 1) if num_chains % k == 0]
    return max(divisors, default=num_chains)


def _checked(target: ChainTarget, initial: Any, num_chains: int) -> Tensor:
    energy: Energy = target.energy
    points = target.unconstrain(initial)
    if not isinstance(points, Tensor) or points.dim() != energy.event_dim + 1:
        shape = tuple(points.shape) if isinstance(points, Tensor) else type(points)
        raise ValueError(
            "initial must hold points of shape (K, *event), that is (K, "
            f"*{tuple(energy.event_shape)}) in unconstrained space; got {shape}."
        )
    energy.batch_shape_of(points)
    if not len(points) or num_chains % len(points):
        raise ValueError(
            f"initial must hold K points, K a divisor of num_chains = {num_chains}, so "
            f"that num_chains / K chains start at each; got {len(points)}."
        )
    return points.detach().to(**energy.tensor_options(points))


# Standardised sites ----------------------------------------------------------------


@torch.no_grad()
def choose_non_centred(target: ChainTarget, start: Start) -> tuple[str, ...]:
    """Choose the sites of a model to standardise.

    Args:
        target: Of centred sites.
        start: Chains on it, which stay where they are.

    Returns:
        Names of sites; none where the target is no traced model or has none to choose.
    """
    model = target.model
    if model is None or not model.is_traced or not isinstance(start.kernel, Kernel):
        return ()
    chosen: tuple[str, ...] = ()
    candidates = _families(sites_to_standardise(model))
    if not 1 <= len(candidates) <= _MAX_SITES:
        return chosen
    u, grad = _first_draws(target, start, start.kernel)
    least = _score(u, grad)
    for names in candidates:
        try:
            centring = NonCentring(model, (*chosen, *names))
            v = centring.from_model(u)
            score = _score(v, centring.gradient(v, grad))
        except (RuntimeError, ValueError):  # not written for many points at once
            continue
        size = sum(model.site_shapes[name].numel() for name in names)
        if score < least - _GAIN * size:
            chosen, least = (*chosen, *names), score
    return chosen


def _families(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Sites that are chosen together: each alone, or where there are many by stem."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stem = re.sub(r"\d+", "", name) if len(names) > _MAX_SITES else name
        stems.setdefault(stem, []).append(name)
    return [tuple(family) for family in stems.values()]


def _first_draws(
    target: ChainTarget, start: Start, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Draws and gradients of a short warm-up, shape ``(N, D)``."""
    state, rows = start.state, []
    warmup = Warmup(
        kernel, target.energy, state, _NUM_STEPS, num_groups=start.num_groups
    )
    for number in range(_NUM_STEPS):
        state, info = warmup.kernel.step(target.energy, state)
        state = warmup.update(state, info)
        if number >= _NUM_STEPS // 2:
            rows.append(state)
    together = ChainState(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    return together.x, together.grad


def _score(v: Tensor, grad: Tensor) -> float:
    """The sum (1), infinite where it is not a number."""
    total = (v.double().var(0) * grad.double().var(0)).log().sum() / 2  # (1)
    return total.nan_to_num(torch.inf, torch.inf, torch.inf).item()
