"""Small data sets with known densities, to try energies on."""

__all__ = [
    "checkerboard",
    "checkerboard_density",
    "eight_gaussians",
    "eight_gaussians_density",
    "two_moons",
    "two_moons_density",
]

from pyro_ebm.datasets.planar import (
    checkerboard,
    checkerboard_density,
    eight_gaussians,
    eight_gaussians_density,
    two_moons,
    two_moons_density,
)
