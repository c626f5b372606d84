"""Targets of known truth, and what a test needs to hold a sampler to it.

A leaf: nothing in the library imports it. Start with
:mod:`~pyro_ebm.testing.targets`; :mod:`~pyro_ebm.testing.validation_targets` has those
on which nothing was tuned, :mod:`~pyro_ebm.testing.finite_targets` those over finite
supports.
"""

__all__ = [
    "CountingEnergy",
    "Target",
    "assert_moments",
    "finite_targets",
    "targets",
    "validation_targets",
]

from pyro_ebm.testing import finite_targets, targets, validation_targets
from pyro_ebm.testing.counting import CountingEnergy
from pyro_ebm.testing.moments import assert_moments
from pyro_ebm.testing.targets import Target
