r"""Exact :math:`\log Z`: closed forms, and quadrature for up to three dimensions."""

__all__ = ["closed_form", "log_cosh", "quadrature"]

from pyro_ebm.partition.exact.closed_form import closed_form
from pyro_ebm.partition.exact.grid import log_cosh
from pyro_ebm.partition.exact.quadrature import quadrature
