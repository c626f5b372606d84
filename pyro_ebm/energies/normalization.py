"""Checks that the density of a distribution integrates to one.

A base, a proposal, noise, a prior: wherever log Z is measured against a density, that
density has to be normalised, or the result is off by a constant that nothing shows.
"""

__all__ = ["require_normalized", "unnormalized_part"]

from typing import Any

import pyro.distributions as dist

from pyro_ebm.energies.corrections import parts_of


def unnormalized_part(distribution: Any) -> Any:
    """The part of a distribution that is not normalised, or ``None``.

    That is an energy whose log Z is unknown or unreliable, an improper density, or
    what is behind a mask.
    """
    # Energy distributions, mixtures and products say it of themselves.
    own = getattr(distribution, "is_normalized", None)
    if own is not None:
        return None if own else distribution
    if isinstance(distribution, dist.MaskedDistribution | dist.ImproperUniform):
        return distribution
    found = map(unnormalized_part, parts_of(distribution).values())
    return next((part for part in found if part is not None), None)


def require_normalized(distribution: Any, name: str) -> None:
    """Check that the argument ``name`` has a density that integrates to one.

    Raises:
        ValueError: If not.
    """
    part = unnormalized_part(distribution)
    if part is None:
        return
    kind = type(part).__name__
    if not hasattr(part, "is_normalized"):
        raise ValueError(
            f"{name} must be normalised, and the density of {kind} does not integrate "
            "to one. Take a proper distribution without a mask."
        )
    raise ValueError(
        f"{name} must be normalised, and log Z of this {kind} is unknown or "
        f"unreliable. Give it one, EnergyDistribution(energy, "
        "pyro_ebm.partition.estimate(energy, base)), or take a distribution of Pyro. "
        "Where the bare energy is meant, it is the attribute energy."
    )
