"""Export of a run to ArviZ."""

__all__ = ["to_arviz"]

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.run.draws import KeptDraws
from pyro_ebm.mcmc.run.driver import ChainRun, step_size_of


def to_arviz(run: ChainRun, samples: dict[str, Tensor], *, log_likelihood: bool) -> Any:
    """Convert draws, deterministic sites, data and sampler statistics to ArviZ.

    There is no ``energy`` among the statistics: ArviZ takes it for the total energy
    with momenta, which kernels here do not record.

    Args:
        run: With draws that were kept.
        samples: Values of the sites, shape ``(num_chains, num_draws, *site)``.
        log_likelihood: Whether to run a Pyro model at the draws.

    Returns:
        An ``arviz.InferenceData``, or an ``xarray.DataTree`` from ArviZ 1 on, with
        groups ``posterior``, ``sample_stats``, ``warmup_sample_stats``, and of a Pyro
        model ``log_likelihood`` and ``observed_data``.

    Raises:
        ImportError: If ArviZ is not installed.
        RuntimeError: If draws were not kept.
        ValueError: If a site has the name of one of ArviZ's own dimensions.
    """
    try:
        import arviz
    except ImportError as error:
        message = "to_arviz needs ArviZ: pip install 'pyro-ebm[arviz]'."
        raise ImportError(message) from error
    if not isinstance(run.draws, KeptDraws):
        raise RuntimeError(
            "to_arviz needs the draws, and keep_draws is False. Use summary(), or run "
            "with keep_draws=True."
        )
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
