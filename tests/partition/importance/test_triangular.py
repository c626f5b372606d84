"""A triangular map fitted to draws, and the terms that it finds."""

import math

import pytest
import torch

from pyro_ebm.partition.importance.triangular import fit_triangular
from pyro_ebm.testing import assert_moments, targets


def wild(num, dim=4):
    """Draws with a correlation, a bend and a funnel at once."""
    z = torch.randn(num, max(dim, 3))
    x = [2 * z[:, 0] + 1, 0.5 * z[:, 1] - z[:, 0]]
    x.append(z[:, 2] + x[0].square() / 3)
    x += [(x[0] / 2).exp() * z[:, k] for k in range(3, dim)]
    return torch.stack(x[:dim], -1)


def raw_terms(fitted, k):
    """Coefficients of coordinate ``k`` in units of the draws, by feature index."""
    column = fitted.columns[k]
    location = dict(zip(column.location_terms, column.location.tolist(), strict=True))
    scale = dict(zip(column.scale_terms, column.log_scale.tolist(), strict=True))
    return location, scale


@pytest.mark.parametrize("dim", [1, 2, 4, 7])
def test_the_inverse_undoes_the_map(dim):
    """Far beyond the draws too, where (3) widens the scale."""
    fitted = fit_triangular(wild(2000, dim), 500.0)
    z = 4 * torch.randn(100, dim)
    x = fitted(z)
    assert x.shape == (100, dim)
    torch.testing.assert_close(fitted.inv(x), z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fitted(fitted.inv(3 * x)), 3 * x, rtol=1e-10, atol=1e-8)


def test_the_log_determinant_is_that_of_autograd():
    """Planted: the doubt of (3) left out of the log scale that is summed, and the scale
    of the draws left out; seen to fail by 0.02 and by 5."""
    fitted = fit_triangular(wild(500), 100.0)
    z = 2 * torch.randn(20, 4)
    x = fitted(z)
    jacobian = torch.autograd.functional.jacobian(
        lambda y: fitted._inverse(y).sum(0), x
    )
    matrices = jacobian.movedim(1, 0)  # (20, 4, 4)
    torch.testing.assert_close(
        fitted.log_abs_det_jacobian(z, x), -torch.linalg.slogdet(matrices).logabsdet
    )
    upper = matrices.triu(1)
    assert (upper == 0).all()


def test_a_funnel_is_found():
    """A log scale that rises by half of the first coordinate, and nothing else.
    Planted: weights of one for those of a Student t in the gradient of the log scale;
    seen to fail."""
    dim, num = 6, 8000
    fitted = fit_triangular(targets.neals_funnel(dim).sample((num,)), num)
    for k in range(1, dim):
        location, scale = raw_terms(fitted, k)
        assert set(location) == {0}
        assert set(scale) == {0, 1}
        # The Student t by whose weights the scale is fitted has an information of
        # 2 nu / (nu + 3) a draw, 1.25; for normal draws the error is nearly that.
        slope = scale[1] / fitted.spread[0]
        error = 1 / math.sqrt(1.25 * num) / 3
        assert abs(slope - 0.5) < 5 * error


def test_a_rosenbrock_ridge_is_found():
    """Each coordinate is the square of the last, of noise ``1 / sqrt(2 b)``."""
    dim, num = 4, 8000
    target = targets.hybrid_rosenbrock(dim)
    fitted = fit_triangular(target.sample((num,)), num)
    noise = 1 / math.sqrt(40.0)
    for k in range(1, dim):
        location, scale = raw_terms(fitted, k)
        assert dim + k in location  # the square of the coordinate before
        # Conditional means at points among the draws, whatever the terms.
        x = target.sample((500,))
        mean, log_scale = fitted._coefficients((x - fitted.center) / fitted.spread)
        mean = mean[:, k] * fitted.spread[k] + fitted.center[k]
        inner = x[:, k - 1].abs() < 3
        assert (mean - x[:, k - 1].square())[inner].abs().max() < 0.3 * noise
        seen = log_scale[:, k].exp() * fitted.spread[k]
        # A Student t of 5 degrees of freedom gives normal draws 0.88 of their scale.
        assert 0.85 < seen.median() / noise < 0.91


def test_independent_draws_have_no_terms():
    """In 10 dimensions there are 135 pairs of a term and a coordinate to be taken for
    one. Planted: a price without ``2 log 3k``; seen to fail with four terms."""
    for seed in range(5):
        torch.manual_seed(seed)
        columns = fit_triangular(torch.randn(1000, 10), 1000).columns
        terms = [f.location_terms + f.scale_terms for f in columns]
        assert sum(term != [0, 0] for term in terms) <= 1


def test_few_effective_draws_buy_no_terms():
    """What 4,000 draws show plainly is not believed of draws that are worth 20."""
    x = torch.randn(4000, 2)
    x[:, 1] += 0.3 * x[:, 0]
    assert raw_terms(fit_triangular(x, 4000.0), 1)[0].keys() == {0, 1}
    assert raw_terms(fit_triangular(x, 20.0), 1)[0].keys() == {0}


def test_doubt_widens_beyond_the_draws():
    """Among many draws the scale is that fitted; far out it grows, the more so the
    fewer draws there are. Planted: the number of draws for the effective number; seen
    to fail with a ratio of one."""

    def scale_at(fitted, place):
        x = torch.tensor([[place, 0.0]])
        return fitted._coefficients(x)[1][0, 1].exp()

    x = torch.randn(4000, 2)
    x[:, 1] += x[:, 0]
    sure, unsure = fit_triangular(x, 4000.0), fit_triangular(x, 40.0)
    for fitted in (sure, unsure):
        assert scale_at(fitted, 100.0) > scale_at(fitted, 5.0) > scale_at(fitted, 0.0)
    assert scale_at(sure, 0.0) / sure.columns[1].log_scale[0].exp() < 1.05
    assert scale_at(unsure, 30.0) > 3 * scale_at(sure, 30.0)


def test_a_log_scale_is_not_followed_without_end():
    """Three beyond those seen, whatever the slope, but for the doubt."""
    x = targets.neals_funnel(2).sample((4000,))
    fitted = fit_triangular(x, 4000.0)
    _, s = fitted._coefficients(torch.tensor([[-1e3, 0.0]]))
    low, _ = fitted.columns[1].bounds
    column = fitted.columns[1]
    features = torch.tensor([1.0, -1e3])
    doubt = torch.linalg.vector_norm(features @ column.scale_root)
    assert column.scale_terms == [0, 1]
    assert s[0, 1] >= low + doubt
    seen = (x - fitted.center) / fitted.spread
    fitted_s = torch.stack([torch.ones(4000), seen[:, 0]], -1) @ column.log_scale
    assert low == pytest.approx(fitted_s.min().item() - 3)


def test_draws_are_straightened():
    """Standard normal, but for outliers that the doubt makes smaller."""
    x = wild(8000)
    z = fit_triangular(x, 8000.0).inv(x)
    assert_moments((z - z.mean(0)) / z.std(0), 0.0, 1.0)
    correlation = torch.corrcoef(torch.cat([z, z.square()], -1).mT)
    off = correlation - correlation.diagonal().diag()
    assert off.abs().max() < 5 / math.sqrt(8000)


def test_a_coordinate_that_stands_still_does_no_harm():
    x = torch.cat([torch.zeros(500, 1), torch.randn(500, 2)], -1)
    fitted = fit_triangular(x, 500.0)
    assert fitted.inv(x).isfinite().all()
    assert fitted(torch.randn(50, 3)).isfinite().all()
