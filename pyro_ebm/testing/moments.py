r"""First and second moments of independent draws against the truth.

.. math::
    z_1 = \frac{\bar x - \mu}{\sqrt{\sigma^2 / N}}, \qquad
    z_2 = \frac{\overline{(x - \mu)^2} - \sigma^2}{\sqrt{(m_4 - \sigma^4) / N}}
    \tag{1}
"""

__all__ = ["assert_moments"]

import torch
from torch import Tensor


def assert_moments(
    draws: Tensor,
    mean: Tensor | float,
    variance: Tensor | float,
    *,
    fourth_central_moment: Tensor | float | None = None,
) -> None:
    """Require ``|z| < 4`` of both statistics (1) in every coordinate.

    The draws must be independent, such as the last states of independent chains, so
    take one state a chain. On a Gaussian the mean alone is blind to a wrong acceptance
    probability; the variance is not.

    Args:
        draws: Shape ``(N, D)``, or ``(N, *event)``.
        mean: Truth, broadcast to ``event``.
        variance: Truth, broadcast to ``event``.
        fourth_central_moment: ``m_4`` of (1), ``3 * variance**2`` for a Gaussian;
            default: the denominator is estimated from the draws.

    Raises:
        AssertionError: If a statistic is too large or not a number; it names the worst.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> assert_moments(torch.randn(1000, 3), 0.0, 1.0, fourth_central_moment=3.0)
    """
    mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
    square = (draws - mean) ** 2
    if fourth_central_moment is None:
        spread = square.std(0)
    else:
        spread = (fourth_central_moment - variance**2).sqrt()
    root_n = len(draws) ** 0.5
    first = (draws.mean(0) - mean) / variance.sqrt() * root_n
    second = (square.mean(0) - variance) / spread * root_n  # (1)
    for name, z, seen, truth in [
        ("mean", first, draws.mean(0), mean),
        ("variance", second, square.mean(0), variance),
    ]:
        size = z.abs().nan_to_num(torch.inf).flatten()
        worst = int(size.argmax())
        if not size[worst] < 4:
            raise AssertionError(
                f"{name} of coordinate {worst} is {seen.flatten()[worst]:.6g}, "
                f"|z| = {size[worst]:.2f} from the true "
                f"{truth.expand_as(z).flatten()[worst]:.6g} ({len(draws)} draws); "
                "|z| < 4 is wanted."
            )
