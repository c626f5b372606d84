r"""Missing data, ``pyro.sample(name, fn, obs=y, obs_mask=mask)``.

Pyro makes two sites of it: ``name_observed`` counts where the mask is true, the latent
``name_unobserved`` where it is false. The latent site has a coordinate for every row,
and those of observed rows have no density at all: they wander, and there is no
evidence.

Nothing depends on them. Here they count too, with the density that the missing rows
have: it integrates to one whatever the other sites are, so the posterior of what is
used stays as it is, and the evidence is that of the observed rows:

.. math::
    p(y_{obs}) = \int p(z)\, p(y_{obs} \mid z)\, p(y_{mis} \mid z)\,
    p(u_{obs} \mid z)\; dz\, dy_{mis}\, du_{obs}                            \tag{1}

Classes that are summed out then sum to one there, too.
"""

__all__ = ["with_missing_data"]

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.energies.pyro_model.model_runs import Model

_OBSERVED, _UNOBSERVED = "_observed", "_unobserved"


def with_missing_data(model: Model) -> Model:
    """A model with the density (1), in which observed rows may also hold ``nan``.

    Args:
        model: A Pyro model. Where it has no missing data, it stays as it is.
    """
    wrapped: Model = _MissingData()(model)
    return wrapped


class _MissingData(Messenger):
    """Takes the mask off the latent half of a site with missing data."""

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[str, Any] = {}  # of the observed halves, by name

    def __enter__(self) -> Any:
        self._masks.clear()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        name, mask = msg["name"], msg["mask"]
        if mask is None:
            return
        if msg["is_observed"] and name.endswith(_OBSERVED):
            self._masks[name.removesuffix(_OBSERVED)] = mask
            msg["value"] = _without_nan(msg["value"], mask, msg["fn"].event_dim)
        elif name.endswith(_UNOBSERVED):
            rest = self._masks.get(name.removesuffix(_UNOBSERVED))
            if rest is not None:  # what is left is the mask around both
                msg["mask"] = mask | rest


def _without_nan(value: Tensor, mask: Any, event_dim: int) -> Tensor:
    """Another row in place of what is nan and hidden, which has no gradient."""
    if not value.is_floating_point():
        return value
    rows = value.isnan().reshape(value.shape[: value.dim() - event_dim] + (-1,)).any(-1)
    hidden = rows & ~torch.as_tensor(mask, device=value.device)
    if not hidden.any() or rows.all():
        return value
    filler = value[~rows][0]
    return torch.where(hidden.reshape(hidden.shape + (1,) * event_dim), filler, value)
