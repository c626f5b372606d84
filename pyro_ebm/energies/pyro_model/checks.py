"""Checks that a Pyro model has a density that an energy can represent."""

__all__ = [
    "check_log_partitions",
    "check_same",
    "check_site",
    "check_sums",
    "check_supports",
]

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace

from pyro_ebm.energies.base import require_precision
from pyro_ebm.energies.corrections import support_of, without_independent
from pyro_ebm.energies.normalization import require_normalized, unnormalized_part
from pyro_ebm.energies.pyro_model.runs import is_masked, samples
from pyro_ebm.energies.views.unconstrained import same_support


def check_log_partitions(trace: Trace) -> None:
    """Check that the energies at the sites of a model know their log Z.

    A posterior can do without, an evidence cannot.

    Raises:
        ValueError: If one does not.
    """
    for name, site in samples(trace):
        part = unnormalized_part(site["fn"])
        if hasattr(part, "is_normalized"):  # masks and improper priors are allowed
            require_normalized(part, f"site {name!r}")


def check_sums(trace: Trace) -> None:
    """Check that no mask is on a discrete site that is summed out.

    Where the mask is False each value of the site counts for one: a constant in a
    posterior, an error in an evidence.

    Raises:
        ValueError: If there is such a mask.
    """
    for name, site in samples(trace):
        is_summed = not site["is_observed"] and site["fn"].support.is_discrete
        if is_summed and is_masked(site):
            raise ValueError(
                f"site {name!r} must not be masked for an evidence: it is discrete, "
                "and where its mask is False each of its values counts for one. Leave "
                "the masked rows out of the model, say by obs_mask which of its data "
                "are missing, or take pyro_ebm.partition.evidence, which does."
            )


def check_site(name: str, site: Any) -> None:
    """Check that a site is continuous, observed, or can be enumerated.

    Raises:
        ValueError: If it is observed to be nan, or of half precision.
        NotImplementedError: If it cannot, or is in a plate that is subsampled.
    """
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise NotImplementedError(
                f"plate {frame.name!r} holds {frame.size} of {frame.full_size} rows, "
                "which were chosen before the model ran, and an energy is that of all "
                "the data. Build the plate inside of the model and without the "
                "argument subsample."
            )
    value = site["value"]
    require_precision(value, f"the value of site {name!r}")
    if site["is_observed"]:
        num_nan = _num_nan(site)
        if num_nan:
            raise ValueError(
                f"obs of site {name!r} must not contain nan, got "
                f"{num_nan} in {value.numel()} numbers. Drop them, say that they are "
                "missing by obs_mask, or fill them with any number of the support and "
                "mask them with poutine.mask."
            )
    elif site["fn"].support.is_discrete:
        if not site["fn"].has_enumerate_support:
            raise NotImplementedError(
                f"site {name!r} is discrete and cannot be enumerated "
                f"({type(site['fn']).__name__}), so it cannot be summed out. Observe "
                "it, replace it by a distribution with finite support, or marginalise "
                "it by hand."
            )


def _num_nan(site: Any) -> int:
    """How many numbers of an observed value are nan, and not hidden by a mask."""
    is_nan = site["value"].isnan()
    if isinstance(without_independent(site["fn"]), dist.MaskedDistribution):
        return 0
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=is_nan.device)
        is_nan = is_nan & mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
    return int(is_nan.sum())


def check_same(first: Trace, second: Trace) -> None:
    """Check that two runs have the same sites.

    Raises:
        ValueError: If they do not.
        NotImplementedError: If a support is not the same in both.
    """
    sites, others = dict(samples(first)), dict(samples(second))
    if list(sites) != list(others):
        only = sorted(set(sites) ^ set(others)) or list(sites)
        raise ValueError(
            f"model must have the same sites at each run; {only} are not in every run "
            "or in another order. Sample them always, and let the values decide by "
            "poutine.mask or torch.where."
        )
    for name, site in sites.items():
        shape, other = site["value"].shape, others[name]["value"].shape
        if shape != other:
            raise ValueError(
                f"site {name!r} must have the same shape at each run, got "
                f"{tuple(shape)} and {tuple(other)}. Sample the largest shape, and "
                "mask what is not used."
            )
    check_supports(first, second)


def check_supports(first: Trace, second: Trace) -> None:
    """Check that the latent sites have the same supports in two runs.

    Raises:
        NotImplementedError: If they do not.
    """
    for name, site in samples(first):
        other: Any = second.nodes[name]["fn"]
        if site["is_observed"] or site["fn"].support.is_discrete:
            continue
        if not same_support(support_of(site["fn"]), support_of(other)):
            raise NotImplementedError(
                f"the support of site {name!r} depends on other sites: "
                f"{site['fn'].support}, then {other.support}. Sample a "
                "variable on a fixed support and map it to where it should be: "
                "low + (high - low) * pyro.sample(name, dist.Beta(1.0, 1.0))."
            )
