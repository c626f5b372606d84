r"""Text and HTML of distributions and models."""

__all__ = ["distribution_html", "log_partition_text"]

from typing import Any

import torch

from pyro_ebm.core.html import rows_table, with_error


def log_partition_text(distribution: Any) -> str:
    r""":math:`\log Z` of an ``EnergyDistribution`` with its error, if it is known.

    Args:
        distribution: With ``log_partition``, its error and ``is_normalized``.
    """
    values = torch.as_tensor(distribution._log_partition).detach()
    if values.dim() and distribution.is_normalized:
        return f"{values.min():.4f} to {values.max():.4f}"
    value, error = (
        torch.as_tensor(number).detach().double().mean().item()
        for number in (
            distribution._log_partition,  # drawing it must move no chains
            distribution.log_partition_std_error,
        )
    )
    shown = with_error(value, error)
    if distribution.is_normalized:
        return shown
    return f"unknown ({shown} is unreliable)" if error > 0 else "unknown"


def distribution_html(distribution: Any, formula: str, problem: str = "") -> str:
    r"""HTML table of a distribution.

    Args:
        distribution: An ``EnergyDistribution``.
        formula: Of its density.
        problem: Why there is no partition function; empty if nothing is known against
            it.
    """
    log_partition = log_partition_text(distribution)
    unit = " nats" if distribution.is_normalized else ""
    verdict = "known" if distribution.is_normalized else "not known"
    if not distribution.is_normalized and "unreliable" in log_partition:
        verdict = "unreliable"
    rows = {
        "density": formula,
        "event shape": str(tuple(distribution.event_shape)),
        "batch shape": str(tuple(distribution.batch_shape)),
        "support": str(distribution.support),
        "log Z": log_partition + unit,
        "verdict": f"not normalizable: {problem}" if problem else verdict,
    }
    return rows_table(type(distribution).__name__, rows)
