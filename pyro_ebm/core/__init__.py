"""What every layer of the library shares: the verdict of a result and its reasons."""

__all__ = ["Finding", "Reason", "Status"]

from pyro_ebm.core.verdict import Finding, Reason, Status
