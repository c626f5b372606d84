"""A run as an ``arviz.InferenceData``."""

__all__ = ["to_arviz"]

import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.draws import KeptDraws
from pyro_ebm.mcmc.driver import ChainRun, step_size_of


def to_arviz(run: ChainRun, samples: dict[str, Tensor]) -> Any:
    """Draws and statistics, with those of the warmup.

    There is no ``energy`` among the statistics: ArviZ takes it for the total energy
    with momenta, which kernels here do not record.

    Args:
        run: With draws that were kept.
        samples: Values of the sites, shape ``(num_chains, num_draws, *site)``.

    Returns:
        An ``arviz.InferenceData`` with groups ``posterior``, ``sample_stats`` and
        ``warmup_sample_stats``.

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
    _check_names(samples)
    draws = run.draws
    statistics = {
        "acceptance_rate": draws["accept_prob"],
        "diverging": draws["divergent"],
        "lp": -draws["energy"],
        "potential_energy": draws["energy"],
        "step_size": step_size_of(run.warmup.kernel).expand_as(draws["energy"]),
    }
    groups: dict[str, Any] = {"sample_stats": _by_chain(statistics)}
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
        groups["save_warmup"] = True
    with warnings.catch_warnings():
        # It takes many chains of few draws for a slip.
        warnings.filterwarnings("ignore", "More chains", UserWarning)
        return arviz.from_dict(
            posterior={name: value.cpu().numpy() for name, value in samples.items()},
            **groups,
        )


def _check_names(samples: dict[str, Tensor]) -> None:
    taken = sorted({"chain", "draw"} & samples.keys())
    if taken:
        raise ValueError(
            f"sites must not be called {taken} in ArviZ, which would drop them for its "
            "dimensions of that name. Rename them in the model, or build the object "
            "from get_samples(group_by_chain=True)."
        )


def _by_chain(statistics: dict[str, Tensor]) -> dict[str, Any]:
    """``(num_draws, num_chains)`` tensors as ``(num_chains, num_draws)`` arrays."""
    return {name: v.transpose(0, 1).cpu().numpy() for name, v in statistics.items()}
