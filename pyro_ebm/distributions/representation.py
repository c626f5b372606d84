"""HTML table of a distribution, for notebooks."""

__all__ = ["distribution_html"]

from typing import Any

from pyro_ebm.core.html import rows_table


def distribution_html(distribution: Any, formula: str, problem: str = "") -> str:
    r"""HTML table of a distribution.

    Args:
        distribution: An ``EnergyDistribution``.
        formula: Of its density.
        problem: Why there is no partition function; empty if nothing is known against
            it.
    """
    log_partition = distribution._log_partition_text()
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
