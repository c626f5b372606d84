"""Exceptions and warnings that a caller may want to catch."""

__all__ = [
    "CompilationWarning",
    "DivergenceError",
    "UnregisteredParameterWarning",
    "UnreliableWarning",
]


class CompilationWarning(UserWarning):
    """An energy could not be compiled, and is evaluated eagerly, which is slower."""


class DivergenceError(RuntimeError):
    """Raised when no chain can move, as the energy is not finite anywhere near them."""


class UnregisteredParameterWarning(UserWarning):
    """A parameter of an energy is not known to Pyro, so no optimiser trains it."""


class UnreliableWarning(UserWarning):
    """An estimate was returned whose verdict is not ``exact`` or ``ok``."""
