r"""Plots of densities, fits, chains and tempering on matplotlib axes.

A leaf that nothing in the library imports. Each function takes the axes to draw on and
returns them, and leaves matplotlib's settings alone; :func:`style` is one look for all,
light or dark.
"""

__all__ = [
    "autocorrelation",
    "density",
    "energy_gap_curve",
    "energy_landscape",
    "generalization_gap_curve",
    "ladder",
    "likelihood_curve",
    "log_partition_curve",
    "product_panels",
    "rank",
    "round_trips",
    "style",
    "thermodynamic_curve",
    "trace",
]

from pyro_ebm.plots.chains import autocorrelation, rank, trace
from pyro_ebm.plots.curves import (
    energy_gap_curve,
    generalization_gap_curve,
    likelihood_curve,
    log_partition_curve,
)
from pyro_ebm.plots.plane import density, energy_landscape, product_panels
from pyro_ebm.plots.style import style
from pyro_ebm.plots.tempering import ladder, round_trips, thermodynamic_curve
