"""Targets of known truth, and what a test needs to hold a sampler to it.

A leaf: nothing in the library imports it. Start with
:mod:`~pyro_ebm.testing.targets`.
"""

__all__ = ["CountingEnergy", "Target", "assert_moments", "targets"]

from pyro_ebm.testing import targets
from pyro_ebm.testing.counting import CountingEnergy
from pyro_ebm.testing.moments import assert_moments
from pyro_ebm.testing.targets import Target
