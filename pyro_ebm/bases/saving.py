"""Fitted bases as tensors and plain values, for a ``state_dict``, and back."""

__all__ = ["from_state", "to_state"]

from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.flow import Flow
from pyro_ebm.bases.kernels import Kernels, NormalKernels
from pyro_ebm.bases.mixed import LatentClasses
from pyro_ebm.bases.mixture import NormalMixture
from pyro_ebm.bases.rows import Rows
from pyro_ebm.bases.stack import Stack
from pyro_ebm.core.spaces import MixedSupport

#: What a density over rows in unconstrained space is made of.
_State = dict[str, Any]


def to_state(base: dist.TorchDistribution) -> _State:
    """What :func:`from_state` needs, as ``torch.load`` takes it with ``weights_only``.

    Args:
        base: From :mod:`pyro_ebm.bases`.

    Raises:
        TypeError: If it is of another origin.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> base = pyro_ebm.bases.normal(torch.randn(100, 2))
        >>> again = from_state(to_state(base), None)
        >>> bool((again.loc == base.loc).all())
        True
    """
    if isinstance(base, Stack):
        return {
            "kind": "stack",
            "probs": base.probs,
            "parts": [to_state(part) for part in base.parts],
        }
    state = _of_rows(_innermost(base))
    return {**state, "event_shape": list(base.event_shape)}


def from_state(state: _State, support: Constraint | None) -> dist.TorchDistribution:
    """The base that was saved.

    Args:
        state: From :func:`to_state`.
        support: Of a row, as the base was fitted with.
    """
    if state["kind"] == "stack":
        parts = [from_state(part, support) for part in state["parts"]]
        return Stack(parts, state["probs"])
    if state["kind"] == "latent_classes":
        if not isinstance(support, MixedSupport):
            raise ValueError(
                "support must be the mixed one that the base was fitted with, got "
                f"{support}. Build the energy with it, then load."
            )
        return LatentClasses(support, *(state[name] for name in LatentClasses.PARTS))
    if state["kind"] == "counts":
        probs = state["probs"]
        return dist.Categorical(probs).to_event(len(state["event_shape"]))
    over_rows = _over_rows(state)
    event_shape = torch.Size(state["event_shape"])
    return Rows.like(over_rows, event_shape, support).distribution(over_rows)


def _innermost(base: Any) -> Any:
    while isinstance(base, dist.TransformedDistribution):
        base = base.base_dist
    return base


def _of_rows(base: Any) -> _State:
    if isinstance(base, dist.MultivariateNormal):
        return {"kind": "normal", "loc": base.loc, "scale_tril": base.scale_tril}
    if isinstance(base, Flow):
        return {"kind": "flow", **base.saved()}
    if isinstance(base, LatentClasses):
        parts = {name: getattr(base, name) for name in LatentClasses.PARTS}
        return {"kind": "latent_classes", **parts}
    inner = base.base_dist if isinstance(base, dist.Independent) else base
    if isinstance(inner, dist.Categorical):
        return {"kind": "counts", "probs": inner.probs}
    if isinstance(inner, dist.MixtureSameFamily):
        probs, parts = inner.mixture_distribution.probs, inner.component_distribution
        if isinstance(inner, NormalMixture):
            state = {"loc": parts.loc, "scale_tril": parts.scale_tril}
            return {"kind": "gaussian_mixture", "probs": probs, **state}
        if isinstance(inner, Kernels):
            state = {"loc": inner.normal.loc, "scale": inner.normal.scale}
            return {"kind": "kernel_density", "probs": probs, **state}
        if isinstance(inner, NormalKernels):
            state = {"loc": parts.loc, "scale": parts.scale}
            return {"kind": "independent", "probs": probs, **state}
    raise TypeError(
        f"base must come from pyro_ebm.bases to be saved, got {type(base).__name__}. "
        "Give it to the EnergyModel as base, and again when it is loaded."
    )


def _over_rows(state: _State) -> dist.TorchDistribution:
    kind = state["kind"]
    if kind == "flow":
        return Flow.restored(state)
    if kind == "normal":
        return dist.MultivariateNormal(
            state["loc"], scale_tril=state["scale_tril"], validate_args=False
        )
    if kind == "gaussian_mixture":
        return NormalMixture(state["probs"], state["loc"], state["scale_tril"])
    if kind == "kernel_density":
        return Kernels(state["probs"], state["loc"], state["scale"])
    kernels = dist.Normal(state["loc"], state["scale"], validate_args=False)
    return NormalKernels(state["probs"], kernels).to_event(1)
