"""Verdicts, errors and other parts that every layer of the library shares."""

__all__ = [
    "CompilationWarning",
    "DivergenceError",
    "Finding",
    "MixedSupport",
    "Reason",
    "Status",
    "UnregisteredParameterWarning",
    "UnreliableWarning",
]

from pyro_ebm.core.errors import (
    CompilationWarning,
    DivergenceError,
    UnregisteredParameterWarning,
    UnreliableWarning,
)
from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.verdict import Finding, Reason, Status
