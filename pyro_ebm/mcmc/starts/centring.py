r"""Choice of the non-centred parametrisation for normal sites with a latent scale.

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

__all__ = ["choose_non_centred"]

import torch
from torch import Tensor

from pyro_ebm.energies.pyro_model.non_centred import NonCentring, sites_to_standardise
from pyro_ebm.mcmc.base import ChainState, Kernel
from pyro_ebm.mcmc.run.target import ChainTarget
from pyro_ebm.mcmc.starts.start import Start
from pyro_ebm.mcmc.warmup.warmup import Warmup

#: Transitions of the chains that tell; the later half are looked at.
_NUM_STEPS = 40
#: Sites to choose from, beyond which a model is left as it is: a loop over time.
_MAX_SITES = 8
#: What (1) must fall by for each coordinate of a site.
_GAIN = 0.1


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
    candidates = sites_to_standardise(model)
    if not 1 <= len(candidates) <= _MAX_SITES:
        return chosen
    u, grad = _first_draws(target, start, start.kernel)
    least = _score(u, grad)
    for name in candidates:
        try:
            centring = NonCentring(model, (*chosen, name))
            v = centring.from_model(u)
            score = _score(v, centring.gradient(v, grad))
        except (RuntimeError, ValueError):  # not written for many points at once
            continue
        if score < least - _GAIN * model.site_shapes[name].numel():
            chosen, least = (*chosen, name), score
    return chosen


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
