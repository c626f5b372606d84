"""The lists of problems, by name."""

__all__ = ["problems", "variants"]

from functools import partial

from . import (
    boxes,
    counts,
    hierarchies,
    regressions,
    supports,
)
from .base import Builder

_PROBLEMS: dict[str, Builder] = {
    "eight_schools_noncentered": hierarchies.eight_schools,
    "gaussian_shells_5d": partial(boxes.gaussian_shells, 5),
    "gaussian_shells_10d": partial(boxes.gaussian_shells, 10),
    "eggbox_2d": partial(boxes.eggbox, 2),
    "eggbox_3d": partial(boxes.eggbox, 3),
    "eggbox_5d": partial(boxes.eggbox, 5),
    "two_modes_10d": partial(
        boxes.gaussian_modes,
        10,
        name="two_modes_10d",
        weights=(0.7, 0.3),
        locs=(-4.0, 4.0),
        scales=(0.5, 0.5),
    ),
    "two_modes_6d": partial(
        boxes.gaussian_modes,
        6,
        name="two_modes_6d",
        weights=(0.2, 1.0),
        locs=(0.0, 6.0),
        scales=(0.2**0.5, 1.0),
    ),
    "rosenbrock_10d": partial(boxes.rosenbrock, 10),
    "log_gamma_10d": partial(boxes.log_gamma, 10),
    "straight_line": regressions.straight_line,
    "correlated_gaussian_2d": partial(
        supports.correlated_gaussian, 2, correlation=0.9999
    ),
    "rare_events": partial(counts.binomial_rates, [5.0] * 3, 1e4, name="rare_events"),
    "dirichlet_edge": partial(
        counts.dirichlet_multinomial, [996, 3, 1, 0], name="dirichlet_edge"
    ),
    "truncated_normal": supports.truncated_normal,
    "von_mises_1": partial(supports.von_mises, 1),
    "lkj_5": partial(supports.lkj, 5),
    "no_events": partial(counts.binomial_rates, [0.0], 1e6, name="no_events"),
    "coin": counts.coin,
    "ball_3d": partial(boxes.ball, 3),
    "gaussian_process": hierarchies.gaussian_process,
    "change_point": counts.change_point,
    "scales_and_correlation": supports.scales_and_correlation,
    "missing_data": supports.missing_data,
}

_BOXES: dict[str, Builder] = {
    "narrow_mode_4d": partial(
        boxes.gaussian_modes,
        4,
        name="narrow_mode_4d",
        weights=(0.3, 0.7),
        locs=(-3.0, 3.0),
        scales=(0.3, 1.0),
    ),
    "three_modes_8d": partial(
        boxes.gaussian_modes,
        8,
        name="three_modes_8d",
        weights=(0.2, 0.3, 0.5),
        locs=(-5.0, 0.0, 5.0),
        scales=(0.5, 1.0, 0.7),
    ),
    "unequal_modes_12d": partial(
        boxes.gaussian_modes,
        12,
        name="unequal_modes_12d",
        weights=(0.5, 0.5),
        locs=(-2.0, 2.0),
        scales=(0.4, 0.6),
    ),
    "torus": boxes.torus,
    **{f"gaussian_shells_{d}d": partial(boxes.gaussian_shells, d) for d in (2, 7)},
    **{f"rosenbrock_{d}d": partial(boxes.rosenbrock, d) for d in (2, 4)},
    **{f"log_gamma_{d}d": partial(boxes.log_gamma, d) for d in (2, 6, 20)},
    **{f"corner_{d}d": partial(boxes.corner, d) for d in (5, 20)},
    **{f"ball_{d}d": partial(boxes.ball, d) for d in (2, 5)},
    **{f"ring_{d}d": partial(supports.ring, d) for d in (2, 6, 20)},
}

_MODELS: dict[str, Builder] = {
    "collinear_2": partial(
        regressions.near_collinear, 2, name="collinear_2", distance=0.01
    ),
    "collinear_5": partial(
        regressions.near_collinear,
        5,
        name="collinear_5",
        distance=1e-3,
        is_noise_known=True,
    ),
    "independent_columns_5": partial(
        regressions.near_collinear,
        5,
        name="independent_columns_5",
        distance=10.0,
        scale=0.1,
    ),
    "wide_columns_5": partial(
        regressions.near_collinear, 5, name="wide_columns_5", distance=1.0, scale=200.0
    ),
    "wide_columns_12": partial(
        regressions.near_collinear,
        12,
        name="wide_columns_12",
        distance=0.05,
        scale=50.0,
    ),
    "logistic_2": partial(regressions.logistic, 2),
    "logistic_3": partial(regressions.logistic, 3),
    "logistic_2_separable": partial(regressions.logistic, 2, is_separable=True),
    "spike_and_slab_4": partial(regressions.spike_and_slab, 4, has_mixture_site=True),
    "spike_and_slab_8": partial(regressions.spike_and_slab, 8),
    "rare_events_8": partial(
        counts.binomial_rates, [0, 1, 2, 0, 3, 1, 0, 0], 1e5, name="rare_events_8"
    ),
    "certain_events": partial(
        counts.binomial_rates, [999, 1000, 1000], 1e3, name="certain_events"
    ),
    "even_chance": partial(
        counts.binomial_rates, [5e4, 4.9e4], 1e5, name="even_chance"
    ),
    "jeffreys_edge": partial(
        counts.binomial_rates, [0, 0, 20], 20, name="jeffreys_edge", prior=(0.5, 0.5)
    ),
    "dirichlet_sparse_10": partial(
        counts.dirichlet_multinomial,
        [80, 12, 5, 2, 1, 0, 0, 0, 0, 0],
        name="dirichlet_sparse_10",
        concentration=0.5,
    ),
    "dirichlet_unseen_3": partial(
        counts.dirichlet_multinomial, [5e3, 0, 0], name="dirichlet_unseen_3"
    ),
    "poisson_zeros_12": partial(
        counts.poisson_rates, [0] * 11 + [1], name="poisson_zeros_12", prior=(0.5, 0.5)
    ),
    "poisson_large_5": partial(
        counts.poisson_rates,
        [1e4, 2e4, 100, 5e3, 3],
        name="poisson_large_5",
        prior=(1.0, 0.01),
    ),
    "exponential_rate_0.001": partial(counts.exponential_rate, 1e-3),
    "binomial_hierarchy": counts.binomial_hierarchy,
    "correlated_gaussian_8d": partial(
        supports.correlated_gaussian, 8, correlation=0.999
    ),
    "von_mises_6": partial(supports.von_mises, 6),
    "lkj_3": partial(supports.lkj, 3, concentration=0.5),
    "lkj_7": partial(supports.lkj, 7, concentration=4.0),
    "upper_end": supports.upper_end,
    "label_switching_2": partial(supports.label_switching, 2),
    "label_switching_3": partial(supports.label_switching, 3),
    "outliers_1": partial(supports.outliers, 1),
    "outliers_4": partial(supports.outliers, 4),
    "square_root_1": partial(supports.square_root, 1),
    "square_root_3": partial(supports.square_root, 3),
}

_HIERARCHIES: dict[str, Builder] = {
    "random_effects_8": partial(hierarchies.random_effects, 8),
    "random_effects_30": partial(hierarchies.random_effects, 30, spread=3.0),
    "funnel_5_prior": partial(hierarchies.funnel, 5),
    "funnel_9": partial(hierarchies.funnel, 9, error=1.0),
    "funnel_4": partial(hierarchies.funnel, 4, error=0.05),
    "horseshoe_2": partial(hierarchies.horseshoe, 2),
    "horseshoe_6": partial(hierarchies.horseshoe, 6),
    "student_t_means_5": partial(hierarchies.student_t_means, 5),
    "laplace_means_10": partial(hierarchies.laplace_means, 10),
    "random_walk_20": partial(hierarchies.random_walk, 20),
    "random_walk_50": partial(hierarchies.random_walk, 50),
    "scale_of_noise_0.001": partial(hierarchies.scale_of_noise, size=1e-3),
    "scale_of_noise_1000": partial(hierarchies.scale_of_noise, size=1e3),
}


def problems() -> dict[str, Builder]:
    """Problems that were hard for this library or are for others.

    Returns:
        For each name a function of the dtype that builds the problem.

    Example:
        >>> round(problems()["eggbox_2d"](torch.float64).truth, 4)
        235.8559
    """
    return dict(_PROBLEMS)


def variants() -> dict[str, Builder]:
    """Other problems of the same kinds, to see whether a rule holds on what is new.

    Returns:
        For each name a function of the dtype that builds the problem.

    Example:
        >>> problem = variants()["corner_5d"](torch.float32)
        >>> round(problem.truth, 4)  # -5 log 1000
        -34.5388
    """
    return {**_BOXES, **_MODELS, **_HIERARCHIES}
