"""Densities and energies over the plane, and products of experts side by side."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_ebm
from pyro_ebm import plots
from pyro_ebm.distributions import ProductOfExperts
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy

BOUNDS = [(-3.0, 3.0), (-2.0, 4.0)]


def bowl(loc=(1.0, 2.0)):
    return QuadraticEnergy(torch.tensor(loc))


def normal(scale):
    return dist.Normal(torch.zeros(2), torch.tensor(scale)).to_event(1)


def test_density_has_its_peak_where_the_distribution_has(ax):
    distribution = dist.MultivariateNormal(torch.tensor([1.0, 2.0]), torch.eye(2) / 9)
    assert plots.density(distribution, BOUNDS, ax, num_points=61) is ax
    image = ax.images[0]
    row, column = divmod(image.get_array().argmax(), 61)
    assert (column / 10 - 3, row / 10 - 2) == pytest.approx((1.0, 2.0))
    assert image.get_extent() == [-3, 3, -2, 4]
    assert image.origin == "lower"


def test_log_density_is_cut_below_its_peak(ax):
    energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
    plots.density(pyro_ebm.EnergyDistribution(energy), BOUNDS, ax, log=True)
    low, high = ax.images[0].get_clim()
    assert high - low == pytest.approx(10.0)


def test_density_shows_points_over_the_image(ax):
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    data, samples = torch.zeros(3, 2), torch.ones(4, 2)
    plots.density(normal, BOUNDS, ax, data=data, samples=samples)
    assert [len(line.get_xdata()) for line in ax.lines] == [3, 4]
    assert ax.get_xlim() == (-3, 3)
    assert ax.get_ylim() == (-2, 4)


def test_density_says_what_it_shows(ax):
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    plots.density(normal, BOUNDS, ax, log=True, colorbar=True)
    assert ax.get_title() == r"log density $\log q(x)$"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_1$", "$x_2$")
    assert ax.figure.axes[-1].get_ylabel() == r"$\log q(x)$ (nats)"


def test_density_says_that_it_is_not_normalised(ax):
    energy = pyro_ebm.energies.FunctionEnergy(lambda x: x.square().sum(-1), (2,))
    plots.density(pyro_ebm.EnergyDistribution(energy), BOUNDS, ax)
    assert ax.get_title() == "unnormalised density $e^{-f(x)}$"


def test_density_is_empty_outside_of_the_support(ax):
    """With validation on, log_prob would refuse the points outside."""
    square = dist.Uniform(torch.zeros(2), 1.0, validate_args=True).to_event(1)
    plots.density(square, [(-1.0, 2.0)] * 2, ax, num_points=31)
    shown = ax.images[0].get_array().filled(math.nan)
    assert (shown[12:18, 12:18] == 1).all()
    assert not (shown[:9] > 0).any()


def test_density_computes_in_the_type_of_the_distribution(ax):
    seen = []

    class Seen(pyro_ebm.energies.QuadraticEnergy):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    energy = Seen(torch.zeros(2, dtype=torch.float32))
    distribution = pyro_ebm.EnergyDistribution(energy, 0.0)
    moved = dist.TransformedDistribution(
        distribution, [dist.transforms.AffineTransform(0.0, 1.0, 1)]
    )
    for q in (distribution, moved):
        plots.density(q, BOUNDS, ax)
    assert set(seen) == {torch.float32}


def test_density_uses_the_current_axes(ax):
    plt.sca(ax)
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    assert plots.density(normal, BOUNDS) is ax


@pytest.mark.parametrize(
    ("dim", "bounds"),
    [(3, BOUNDS), (2, BOUNDS[:1]), (2, [(0.0, 0.0), (0.0, 1.0)])],
)
def test_density_refuses(dim, bounds, ax):
    normal = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    with pytest.raises(ValueError, match="event_shape|bounds"):
        plots.density(normal, bounds, ax)


def test_contours_are_heights_in_nats(ax):
    """The contour at 2 nats of (x - m)^2 / 2 is the circle of radius 2 around m."""
    assert plots.energy_landscape(bowl(), BOUNDS, ax, max_height=5.0) is ax
    filled, lines = ax.collections[:2]
    assert filled.levels == pytest.approx(np.linspace(0, 5, 11))
    vertices = np.concatenate([p.vertices for p in [lines.get_paths()[4]]])
    assert lines.levels[4] == 2.0
    radius = np.hypot(*(vertices - np.array([1.0, 2.0])).T)
    assert radius == pytest.approx(2.0, abs=0.02)
    assert ax.figure.axes[-1].get_ylabel() == r"$f(x) - \min f$ (nats)"
    assert (ax.get_xlim(), ax.get_ylim()) == (BOUNDS[0], BOUNDS[1])


@pytest.mark.parametrize("wrap", [lambda e: e, pyro_ebm.EnergyDistribution])
def test_arrows_point_down_the_energy(wrap, ax):
    plots.energy_landscape(wrap(bowl()), BOUNDS, ax, gradient=True, colorbar=False)
    (arrows,) = (c for c in ax.collections if hasattr(c, "U"))
    inwards = np.array([1.0, 2.0]) - arrows.XY
    along = inwards[:, 0] * arrows.U + inwards[:, 1] * arrows.V
    length = np.hypot(arrows.U, arrows.V)
    assert along == pytest.approx(length * np.hypot(*inwards.T))
    assert length.max() < 1
    assert len(ax.figure.axes) == 1


def test_chains_are_drawn_from_their_start(ax):
    chains = torch.randn(25, 7, 2)
    plots.energy_landscape(bowl(), BOUNDS, ax, chains=chains)
    assert "20 chains" in ax.get_title()
    paths = [line for line in ax.lines if len(line.get_xdata()) == 7]
    starts = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert (len(paths), len(starts)) == (40, 20)  # each path twice, for its edge
    assert paths[0].get_ydata() == pytest.approx(chains[0, :, 1].numpy())
    assert starts[3].get_xdata() == pytest.approx(chains[3, :1, 0].numpy())


def test_landscape_is_empty_outside_of_the_support(ax):
    def energy(x):
        assert (x > 0).all()
        return x.log().square().sum(-1)

    support = constraints.independent(constraints.positive, 1)
    found = FunctionEnergy(energy, (2,), support)
    plots.energy_landscape(found, [(-1.0, 3.0)] * 2, ax, gradient=True)
    lines = ax.collections[1]
    vertices = np.concatenate([p.vertices for p in lines.get_paths() if len(p)])
    assert vertices.min() > 0


@pytest.mark.parametrize(
    ("energy", "settings", "message"),
    [
        (normal([1.0, 1.0]), {}, "DistributionEnergy"),
        (QuadraticEnergy(torch.zeros(3)), {}, "event_shape"),
        (bowl(), {"max_height": 0.0}, "max_height"),
        (bowl(), {"chains": torch.zeros(5, 2)}, r"chain\[None\]"),
    ],
)
def test_landscape_refuses(energy, settings, message, ax):
    with pytest.raises((TypeError, ValueError), match=message):
        plots.energy_landscape(energy, BOUNDS, ax, **settings)


def test_panels_show_each_factor_and_the_product():
    p, q = normal([0.5, 2.0]), normal([2.0, 0.5])
    product = ProductOfExperts([p, bowl(), q], [1.0, 0.5, -0.1])
    axes = plots.product_panels(
        product, BOUNDS, num_points=31, samples=torch.ones(4, 2)
    )
    x, y = np.meshgrid(np.linspace(*BOUNDS[0], 31), np.linspace(*BOUNDS[1], 31))
    logs = [
        -((x / 0.5) ** 2 + (y / 2) ** 2) / 2,
        -((x - 1) ** 2 + (y - 2) ** 2) / 4,
        +0.1 * ((x / 2) ** 2 + (y / 0.5) ** 2) / 2,
    ]
    for ax, expected in zip(axes, [*logs, sum(logs)], strict=True):
        image = ax.images[0].get_array().filled(math.nan)
        np.testing.assert_allclose(image, np.exp(expected - expected.max()), atol=1e-6)
        assert ax.get_xlabel() == "$x_1$"
    titles = [ax.get_title() for ax in axes]
    assert titles[0] == "Normal(...)"
    assert titles[1] == "$\\times$ QuadraticEnergy(...) ** 0.5"
    assert titles[-1] == "$=$ product"
    assert [len(ax.lines) for ax in axes] == [0, 0, 0, 1]
    plt.close(axes[0].figure)


def test_panels_of_logarithms_reach_down_ten_nats():
    product = ProductOfExperts([normal([1.0, 1.0]), bowl()])
    figure, given = plt.subplots(1, 3)
    axes = plots.product_panels(product, BOUNDS, given, log=True)
    assert list(axes) == list(given)
    assert all(ax.images[0].get_clim() == (-10.0, 0.0) for ax in axes)
    plt.close(figure)


def test_panels_take_a_product_of_an_own_distribution():
    """A title has the name of the energy, without what wraps it."""
    product = pyro_ebm.EnergyDistribution(bowl(), math.log(2 * math.pi)) * normal(
        [1, 1]
    )
    axes = plots.product_panels(product, BOUNDS)
    assert axes[0].get_title() == "QuadraticEnergy"
    plt.close(axes[0].figure)


@pytest.mark.parametrize(
    ("product", "settings", "message"),
    [
        (normal([1.0, 1.0]), {}, "ProductOfExperts"),
        (ProductOfExperts([bowl()]), {"axes": []}, "axes must be 2"),
        (
            ProductOfExperts([bowl()]),
            {"axes": [1, 2], "titles": []},
            "titles must be 1",
        ),
    ],
)
def test_panels_refuse(product, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plots.product_panels(product, BOUNDS, **settings)
