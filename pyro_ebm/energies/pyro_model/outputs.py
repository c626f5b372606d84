r"""Deterministic values and log-likelihoods of a Pyro model at draws of its sites.

For a draw :math:`z` of all of them, the deterministic sites :math:`g(z)`, and of each
observed site :math:`\log p(y_i \mid z)`, an observation a number.
"""

__all__ = ["ModelOutputs", "model_outputs"]

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_ebm.energies.pyro_model.full_data import has_whole_plates, with_missing_data
from pyro_ebm.energies.pyro_model.runs import (
    FailuresAreNan,
    Model,
    WithoutValidation,
    run_model,
    samples,
)

#: Numbers that are computed at a time.
_CHUNK = 2**20


class ModelOutputs(NamedTuple):
    """Deterministic values and log-likelihoods at ``N`` draws.

    Attributes:
        deterministic: Of each deterministic site, shape ``(N, *site)``.
        log_likelihood: Of each observed site, in nats, shape ``(N, *batch_shape)``;
            ``nan`` where a mask hides the observation.
        observed: Data of each observed site, shape ``(*batch_shape, *event_shape)``.
    """

    deterministic: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    observed: dict[str, Tensor]


@torch.no_grad()
def model_outputs(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor],
) -> ModelOutputs:
    """Run a model at draws, many at once where it allows that.

    Args:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its arguments.
        values: Draws of its continuous latent sites, shape ``(N, *site)``.

    Returns:
        Nothing but the data where the model has discrete latent sites, of which there
        are no draws, or plates that subsample.
    """
    model = with_missing_data(model)
    with torch.random.fork_rng(devices=[]):
        trace = run_model(model, args, kwargs)
        observed = {
            name: site["value"]
            for name, site in samples(trace)
            if site["is_observed"] and not _is_auxiliary(site)
        }
        if not _is_determined(trace, values):
            return ModelOutputs({}, {}, observed)

        def one(
            point: dict[str, Tensor],
        ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            return _outputs(model, args, kwargs, point)

        num_draws = len(next(iter(values.values())))
        size = sum(v.numel() for part in one(_at(values, 0)) for v in part.values())
        parts = _chunks(one, values, max(_CHUNK // max(size, 1), 1), num_draws)
        deterministic, log_likelihood = (
            {name: torch.cat([part[kind][name] for part in parts]) for name in first}
            for kind, first in enumerate(parts[0])
        )
    return ModelOutputs(deterministic, log_likelihood, observed)


def _outputs(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    point: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Deterministic values and log-likelihoods at one draw."""
    given = poutine.condition(model, data=point)
    with poutine.block(), WithoutValidation(), FailuresAreNan():
        trace = poutine.trace(given).get_trace(*args, **kwargs)
    deterministic, log_likelihood = {}, {}
    for name, site in samples(trace):
        if site["infer"].get("_deterministic"):
            deterministic[name] = site["value"]
        elif site["is_observed"] and name not in point and not _is_auxiliary(site):
            log_prob = site["fn"].log_prob(site["value"])
            if site["mask"] is not None:
                log_prob = torch.where(
                    torch.as_tensor(site["mask"]), log_prob, torch.nan
                )
            log_likelihood[name] = log_prob
    return deterministic, log_likelihood


def _chunks(
    one: Any, values: Mapping[str, Tensor], size: int, num_draws: int
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Outputs at all draws, by ``vmap`` if it gives those of a plain run."""
    first, last = _at(values, 0), _at(values, num_draws - 1)
    many = torch.func.vmap(one, randomness="different")
    try:
        pair = many({k: torch.stack([first[k], last[k]]) for k in first})
        is_same = all(
            torch.allclose(pair[kind][name][number], value, 1e-3, 1e-5, equal_nan=True)
            for number, point in enumerate((first, last))
            for kind, part in enumerate(one(point))
            for name, value in part.items()
        )
    except (RuntimeError, ValueError, IndexError, KeyError):  # not written for that
        is_same = False
    if is_same:
        starts = range(0, num_draws, size)
        return [many({k: v[i : i + size] for k, v in values.items()}) for i in starts]
    rows = [one(_at(values, number)) for number in range(num_draws)]
    found = [
        {name: torch.stack([row[kind][name] for row in rows]) for name in rows[0][kind]}
        for kind in (0, 1)
    ]
    return [(found[0], found[1])]


def _at(values: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: value[number] for name, value in values.items()}


def _is_auxiliary(site: Any) -> bool:
    """Deterministic sites and factors, which are no data."""
    infer = site["infer"]
    unit = isinstance(site["fn"], dist.Unit)
    return unit or bool(infer.get("_deterministic") or infer.get("is_auxiliary"))


def _is_determined(trace: poutine.Trace, values: Mapping[str, Tensor]) -> bool:
    """Whether the values are those of all latent sites, and plates are whole."""
    latent = {name for name, site in samples(trace) if not site["is_observed"]}
    return latent <= values.keys() and has_whole_plates(trace)
