r"""Mixture of energies: minus the log of a weighted sum of densities.

.. math::
    f(x) &= -\log \sum_{k=1}^K \exp(\ell_k - f_k(x))                        \tag{1} \\
    \nabla f(x) &= \sum_k r_k(x)\, \nabla f_k(x), \qquad
        r_k(x) = \exp(\ell_k - f_k(x) + f(x))                              \tag{2} \\
    Z &= \sum_k \exp(\ell_k)\, Z_k                                         \tag{3}
"""

__all__ = ["MixtureEnergy"]

from collections.abc import Sequence
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from pyro_ebm.energies.algebra import require_same_space
from pyro_ebm.energies.base import ClosedForm, Energy


@final
class MixtureEnergy(Energy):
    r"""The mixture (1) of unnormalised densities :math:`e^{-f_k}`.

    By (3) the weight of the *normalised* component :math:`q_k = e^{-f_k} / Z_k` is
    proportional to :math:`\exp(\ell_k)\, Z_k`, not to :math:`\exp(\ell_k)`: adding
    :math:`c` to :math:`f_k` lowers the weight of its component by :math:`e^{-c}`. For
    chosen weights :math:`w_k` pass :math:`\ell_k = \log w_k - \log Z_k`.

    Args:
        energies: The components :math:`f_k`, at least one.
        logits: :math:`\ell_k`, shape ``(K,)``, default: zeros. A ``nn.Parameter`` is
            learned.

    Raises:
        TypeError: If a component is no energy.
        ValueError: If there is no component, if they differ in event shape or support,
            or if ``logits`` are not ``K`` finite numbers.

    Example:
        >>> gaussian = pyro_ebm.energies.QuadraticEnergy
        >>> parts = [gaussian(torch.zeros(1)), gaussian(torch.ones(1))]
        >>> f = MixtureEnergy(parts, torch.tensor([0.0, 1.0]))
        >>> closed = f.closed_form()
        >>> closed.distribution.mixture_distribution.probs
        tensor([0.2689, 0.7311], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(
        self, energies: Sequence[Energy], logits: Tensor | None = None
    ) -> None:
        if not energies:
            raise ValueError("energies must hold at least one Energy, got none.")
        require_same_space(*energies)
        logits = torch.zeros(len(energies)) if logits is None else logits
        if logits.shape != (len(energies),) or not logits.isfinite().all():
            raise ValueError(
                f"logits must be {len(energies)} finite numbers, one for each of the "
                f"energies; got {logits}. Leave out a component of weight 0."
            )
        shape = broadcast_shape(*(energy.batch_shape for energy in energies))
        super().__init__(energies[0].event_shape, energies[0].support, shape)
        self.energies: Sequence[Energy] = nn.ModuleList(energies)  # type: ignore[assignment]
        if isinstance(logits, nn.Parameter):
            self.logits = logits
        else:
            self.register_buffer("logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*sample, *batch, *event)``."""
        energies = torch.stack([energy(x) for energy in self.energies], -1)
        return -torch.logsumexp(self.logits - energies, -1)  # (1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the parts' own gradients by the responsibilities (2)."""
        parts = [energy.value_and_grad(x) for energy in self.energies]
        log_weights = self.logits.detach() - torch.stack([p[0] for p in parts], -1)
        value = -torch.logsumexp(log_weights, -1)
        grad = torch.zeros_like(x)
        responsibilities = log_weights.softmax(-1).unbind(-1)
        for r, (_, part_grad) in zip(responsibilities, parts, strict=True):
            r = r.reshape(r.shape + (1,) * self.event_dim)
            # A component outside its domain has no weight and often no gradient.
            grad = grad + (r * part_grad).where(r != 0, 0.0)  # (2)
        return value, grad

    def closed_form(self) -> ClosedForm | None:
        r""":math:`\log Z` by (3), where every component is Gaussian by its own account.

        Exactness: *exact* where it is not ``None``.
        """
        known = (energy.closed_form() for energy in self.energies)
        closed = [form for form in known if form is not None]
        parts = [form.distribution for form in closed]
        gaussian = [part for part in parts if isinstance(part, dist.MultivariateNormal)]
        if len(gaussian) < len(self.energies):
            return None
        shape = self.batch_shape
        constants = [c.log_partition.expand(shape) for c in closed]
        log_weights = self.logits + torch.stack(constants, -1)
        gaussian = [part.expand(shape) for part in gaussian]
        components = dist.MultivariateNormal(
            torch.stack([p.loc for p in gaussian], -2),
            scale_tril=torch.stack([p.scale_tril for p in gaussian], -3),
            validate_args=False,
        )
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights, validate_args=False),
            components,
            validate_args=False,
        )
        return ClosedForm(torch.logsumexp(log_weights, -1), mixture)  # (3)
