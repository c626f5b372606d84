"""Bases fitted to data: densities that an energy starts from and corrects."""

__all__ = [
    "FittedBase",
    "committee",
    "fit",
    "flow",
    "gaussian_mixture",
    "independent",
    "kernel_density",
    "latent_classes",
    "normal",
]

from pyro_ebm.bases.choice import FittedBase, fit
from pyro_ebm.bases.committee import committee
from pyro_ebm.bases.flow import flow
from pyro_ebm.bases.kernels import independent, kernel_density
from pyro_ebm.bases.mixed import latent_classes
from pyro_ebm.bases.mixture import gaussian_mixture, normal
