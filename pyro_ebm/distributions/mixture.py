r"""Mixture of experts: a weighted mean of normalised densities.

.. math::
    q(x) = \sum_{k=1}^K w_k\, q_k(x), \qquad q_k(x) = e^{-f_k(x)} / Z_k     \tag{1}

Its energy is :math:`f(x) = -\log \sum_k \exp(\log w_k - \log Z_k - f_k(x))`, whose own
:math:`\log Z` is 0. The weights are those of *normalised* densities: every :math:`Z_k`
matters, unlike in a product. With estimates :math:`\log\hat Z_k` of independent errors
:math:`\sigma_k` the partition function is :math:`\sum_k w_k Z_k / \hat Z_k`, and

.. math::
    \mathrm{se}(\log Z)^2 = \sum_k w_k^2\, \sigma_k^2                       \tag{2}

by the delta method. It is the error of :math:`\log q` averaged over :math:`q`; that at
one point has the responsibilities of the experts there in the place of :math:`w_k`.
"""

__all__ = ["ExpertDraws", "ExpertsEnergy", "MixtureOfExperts"]

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.verdict import Status, status_of
from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.model import EnergyModel
from pyro_ebm.distributions.representation import distribution_html
from pyro_ebm.energies import ClosedForm, DistributionEnergy, Energy, MixtureEnergy
from pyro_ebm.energies.closed_form.gaussian import GaussianForm, gaussian_form
from pyro_ebm.energies.distribution import require_single
from pyro_ebm.mcmc import SamplingDiagnostics
from pyro_ebm.mcmc.samplers.sampler import Draws


@final
class MixtureOfExperts(EnergyDistribution):
    r"""Mixture (1) of normalised distributions.

    A draw picks an expert by the weights, and is a draw of it. Under
    :class:`pyro_ebm.infer.Learn` each expert learns with chains of its own,
    and plain gradients reach the weights. (Where the mixture is a factor of a product
    that is learned, only experts with a closed form can learn: the gradient of any
    other :math:`\log Z_k` is missing there, and asking for it is an error.)

    Args:
        experts: At least one: an :class:`EnergyDistribution` whose :math:`\log Z` is
            known or estimated, an :class:`EnergyModel` that tracks it, or any Pyro
            distribution; of one event shape and support, with empty batch shapes.
        weights: :math:`w_k > 0`, numbers that sum to 1, shape ``(K,)``; default: equal.
            They may have a gradient (``logits.softmax(-1)``, ``pyro.param`` with
            ``constraints.simplex``) or be latent, such as a draw of a Dirichlet.
        validate_args: Whether ``log_prob`` checks its argument; Pyro's default.

    Raises:
        TypeError: If an expert is no distribution.
        ValueError: If the :math:`\log Z` of an expert is unknown, if experts differ in
            event shape or support or have a batch shape, or if the weights are not
            ``K`` positive numbers that sum to 1.

    Warns:
        UnreliableWarning: If the :math:`\log Z` of an expert is unreliable.

    Exactness: as that of the experts. ``is_normalized`` is true where all theirs are;
    ``log_partition_std_error`` is (2).

    Example:
        >>> ring = pyro_ebm.energies.FunctionEnergy(
        ...     lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,)
        ... )
        >>> log_partition = pyro_ebm.partition.estimate(ring)
        >>> dot = dist.Normal(torch.zeros(2), 0.2).to_event(1)
        >>> target = MixtureOfExperts(
        ...     [pyro_ebm.EnergyDistribution(ring, log_partition), dot], [0.7, 0.3]
        ... )
        >>> target.sample((5,)).shape
        torch.Size([5, 2])
        >>> pyro_ebm.partition.estimate(target).value
        0.0
    """

    def __init__(
        self,
        experts: "Sequence[EnergyDistribution | EnergyModel | dist.TorchDistribution]",
        weights: "Sequence[float] | Tensor | None" = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not experts:
            raise ValueError("experts must hold at least one distribution, got none.")
        parts = [_normalised(expert, k) for k, expert in enumerate(experts)]
        own = [part for part in parts if isinstance(part, EnergyDistribution)]
        energies = [_energy_of(part) for part in parts]
        weights = _checked_weights(weights, energies)
        log_partitions = _stacked(parts, "log_partition", like=weights)
        energy = ExpertsEnergy(
            energies,
            weights.log() - log_partitions,
            [part.energy for part in own if not part.log_partition.requires_grad],
        )
        sampler = ExpertDraws(energy, parts, weights.detach())
        super().__init__(energy, 0.0, sampler=sampler, validate_args=validate_args)
        self._set_experts(parts)
        self.weights = weights
        self.is_normalized = all(part.is_normalized for part in own)
        errors = _stacked(parts, "log_partition_std_error", like=weights)
        self.log_partition_std_error = (weights.detach() * errors).norm()  # (2)

    @property
    def experts(self) -> tuple[dist.TorchDistribution, ...]:
        """The normalised distributions :math:`q_k`."""
        return tuple(vars(self)[f"expert_{k}"] for k in range(len(self.weights)))

    def _set_experts(self, experts: Sequence[dist.TorchDistribution]) -> None:
        # One attribute each: what switches validation off looks for parts there.
        self.__dict__.update({f"expert_{k}": part for k, part in enumerate(experts)})

    @property
    def base(self) -> "MixtureOfExperts | None":
        """The known, normalised mixture of what the experts are compared with."""
        bases = [_base_of(expert) for expert in self.experts]
        known = [base for base in bases if base is not None]
        if len(known) < len(bases):
            return None
        return MixtureOfExperts(known, self.weights.detach())

    @property
    def mean(self) -> Tensor:
        """The mean, of experts that know theirs."""
        mean = self._averaged([expert.mean for expert in self.experts])
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate, of experts that know theirs."""
        squares = [expert.variance + expert.mean.square() for expert in self.experts]
        variance = self._averaged(squares) - self.mean.square()
        return variance.expand(self.batch_shape + self.event_shape)

    def _averaged(self, values: Sequence[Tensor]) -> Tensor:
        total: Any = sum(w * v for w, v in zip(self.weights, values, strict=True))
        return torch.as_tensor(total)

    def map_experts(
        self, replace: Callable[[int, dist.TorchDistribution], dist.TorchDistribution]
    ) -> "MixtureOfExperts":
        """The same mixture with other densities for ``log_prob``.

        Args:
            replace: From the number of an expert and the expert to what stands for it.
        """
        new: Any = self.expand(self.batch_shape)
        new._set_experts([replace(k, expert) for k, expert in enumerate(self.experts)])
        return new

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Logarithm of (1), with all gradients that the experts give.

        Args:
            x: Shape broadcastable to ``(*sample, *batch, *event)``.

        Returns:
            Shape ``(*sample, *batch)``, in nats.

        Raises:
            ValueError: If ``x`` is outside the support, or an expert raises it.
            NotImplementedError: If an expert's log_prob raises it.
        """
        x = self._expanded(x)
        parts = torch.stack([expert.log_prob(x) for expert in self.experts], -1)
        return torch.logsumexp(self.weights.log() + parts, -1)  # (1)

    def require_fit_for_guide(self) -> None:
        """See :meth:`EnergyDistribution.require_fit_for_guide`, of each expert."""
        for expert in self.experts:
            if isinstance(expert, EnergyDistribution):
                expert.require_fit_for_guide()

    def _formula(self) -> str:
        names = [
            type(getattr(e, "energy", getattr(e, "base_dist", e))).__name__
            for e in self.experts
        ]
        terms = zip(self.weights.tolist(), names, strict=True)
        return " + ".join(f"{weight:.3g} {name}" for weight, name in terms)

    def _repr_html_(self) -> str:
        return distribution_html(self, self._formula())


@final
class ExpertsEnergy(Energy):
    """The energy of (1): a :class:`MixtureEnergy` that knows more closed forms.

    Args:
        energies: Of the experts.
        logits: ``log w_k - log Z_k``, shape ``(K,)``.
        unknown: Energies whose ``log Z`` in the logits lacks its gradient.
    """

    def __init__(
        self, energies: Sequence[Energy], logits: Tensor, unknown: Sequence[Energy]
    ) -> None:
        mixture = MixtureEnergy(energies, logits)
        super().__init__(mixture.event_shape, mixture.support)
        self.mixture = mixture
        self._unknown = tuple(unknown)  # they are submodules of the mixture

    def forward(self, x: Tensor) -> Tensor:
        """Energy at ``x`` of shape ``(*batch, *event)``."""
        learned = [
            parameter
            for energy in self._unknown
            for parameter in energy.parameters()
            if parameter.requires_grad
        ]
        if not learned or not torch.is_grad_enabled():
            return self.mixture(x)
        # Nothing is added but a place in the graph, on the way to those parameters.
        nothing = torch.cat([parameter.flatten()[:0] for parameter in learned]).sum()
        nothing.register_hook(_refuse)
        energies = torch.stack([energy(x) for energy in self.mixture.energies], -1)
        return -torch.logsumexp(self.mixture.logits + nothing - energies, -1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By the experts' own gradients."""
        return self.mixture.value_and_grad(x)

    def closed_form(self) -> ClosedForm | None:
        """Known where every expert is: draws are exact then. Exactness: *exact*."""
        known = [energy.closed_form() for energy in self.mixture.energies]
        closed = [form for form in known if form is not None]
        if len(closed) < len(known):
            return None
        log_weights = self.mixture.logits + torch.stack(
            [form.log_partition for form in closed]
        )
        mixture = MixtureOfExperts(
            [form.distribution for form in closed], log_weights.softmax(-1)
        )
        return ClosedForm(torch.logsumexp(log_weights, -1), mixture)


@gaussian_form.register
def _(energy: ExpertsEnergy) -> GaussianForm | None:
    forms = []
    logits = energy.mixture.logits.double()
    for part, logit in zip(energy.mixture.energies, logits, strict=True):
        form = gaussian_form(part)
        if form is None:
            return None
        forms.append(form._replace(constant=form.constant + logit))
    return GaussianForm(*map(torch.cat, zip(*forms, strict=True)))


def _refuse(_: Tensor) -> None:
    raise NotImplementedError(
        "the energy of a MixtureOfExperts depends on the log Z of its experts, whose "
        "gradient in their parameters is not known here. Learn the mixture at a site "
        "of its own by pyro_ebm.infer.Learn, or take experts with a "
        "closed form, or learn the experts first and switch them off: "
        "expert.requires_grad_(False)."
    )


@final
class ExpertDraws:
    """Sampler of a mixture: picks an expert by its weight and draws from it.

    Args:
        energy: Of the mixture.
        experts: Normalised.
        weights: Probability of each, shape ``(K,)``.
    """

    def __init__(
        self,
        energy: Energy,
        experts: Sequence[dist.TorchDistribution],
        weights: Tensor,
    ) -> None:
        self.energy, self.experts, self.weights = energy, experts, weights

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Draws in no order, shape ``(num_draws, *event)``.

        Raises:
            ValueError: If ``energy`` is not that of the mixture.
        """
        if energy is not self.energy:
            raise ValueError(
                "the sampler of a MixtureOfExperts draws from that mixture only, got "
                f"another energy, a {type(energy).__name__}. Give a sampler such as "
                "pyro_ebm.mcmc.IndependentChains()."
            )
        return self._draw(num_draws, lambda expert, n: expert.sample(torch.Size([n])))

    def draw_diagnosed(self, energy: Energy, num_draws: int) -> Draws:
        """The same, with all that speaks against the draws of the experts."""
        x = self(energy, num_draws)
        energies = [e for e in self.experts if isinstance(e, EnergyDistribution)]
        found: list[SamplingDiagnostics] = []
        for expert in energies:
            with contextlib.suppress(RuntimeError):  # none of this one was drawn
                found.append(expert.sampling_diagnostics())
        reasons = tuple(reason for part in found for reason in part.reasons)
        is_exact = all(part.status is Status.EXACT for part in found)
        status = status_of(reasons, Status.EXACT if is_exact else Status.OK)
        return Draws(x, SamplingDiagnostics(type(self).__name__, status, reasons))

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Starting points of the experts' own samplers, by weight."""
        return self._draw(num_draws, _cheap_draws)

    def _draw(
        self,
        num_draws: int,
        draw: Callable[[dist.TorchDistribution, int], Tensor],
    ) -> Tensor:
        chosen = torch.multinomial(self.weights, num_draws, replacement=True)
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        draws = [
            draw(expert, count)
            for expert, count in zip(self.experts, counts, strict=True)
            if count
        ]
        sorted_draws = torch.cat([part.to(draws[0]) for part in draws])
        return sorted_draws[chosen.argsort(stable=True).argsort()]


def _cheap_draws(expert: Any, num_draws: int) -> Tensor:
    if isinstance(expert, EnergyDistribution) and expert.closed_form() is None:
        return expert._sampler.start(expert.energy, num_draws)
    draws: Tensor = expert.sample(torch.Size([num_draws]))
    return draws


def _normalised(expert: Any, number: int) -> dist.TorchDistribution:
    r"""The expert, with its :math:`\log Z`.

    Args:
        expert: Distribution or :class:`EnergyModel`.
        number: Its place, for messages.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If it has a batch shape, or its :math:`\log Z` is unknown or free.

    Warns:
        UnreliableWarning: If its :math:`\log Z` is unreliable.
    """
    name = f"experts[{number}]"
    if isinstance(expert, EnergyModel):
        tracked = expert.log_partition.value
        if expert.energy.closed_form() is None and not tracked.isfinite():
            raise _unknown(name, expert.energy)
        expert = expert()
    require_single(expert, name)
    if not isinstance(expert, EnergyDistribution):
        return expert
    expert.require_no_free_log_partition()
    if expert.is_normalized:
        return expert
    known = expert.closed_form()
    if known is not None:
        expert = expert.expand(())
        expert.log_partition, expert.log_partition_std_error = known.log_partition, 0.0
        expert.is_normalized = True
        return expert
    if not expert.log_partition_std_error > 0:  # an estimate has an error
        raise _unknown(name, expert.energy)
    warnings.warn(
        f"the log Z of {name}, {expert.log_partition.item():.4g} +- "
        f"{float(expert.log_partition_std_error):.2g}, is unreliable, and with it the "
        "weights of the mixture.",
        UnreliableWarning,
        stacklevel=3,
    )
    return expert


def _unknown(name: str, energy: Energy) -> ValueError:
    return ValueError(
        f"{name} must know its log Z, for the weights are those of normalised "
        f"densities; that of this {type(energy).__name__} is unknown. Estimate it: "
        "EnergyDistribution(energy, pyro_ebm.partition.estimate(energy, base)), or "
        "energy_model.log_partition.refresh(energy) before an EnergyModel has learned. "
        "(Where chosen constants are meant, not weights: energies.MixtureEnergy.)"
    )


def _energy_of(expert: Any) -> Energy:
    """The energy of an expert, of a Pyro distribution minus its log density."""
    if isinstance(expert, EnergyDistribution):
        return expert.energy
    return DistributionEnergy(expert)


def _base_of(expert: Any) -> dist.TorchDistribution | None:
    """A Pyro distribution itself, of an energy its closed form or its base."""
    if not isinstance(expert, EnergyDistribution):
        return expert
    known = expert.closed_form()
    if known is not None:
        return known.distribution
    holders = (expert, expert.owner, expert.sampler)
    bases = (getattr(holder, "base", None) for holder in holders)
    return next((base for base in bases if base is not None), None)


def _checked_weights(
    weights: "Sequence[float] | Tensor | None", energies: Sequence[Energy]
) -> Tensor:
    """The weights as a tensor like those of the energies, divided by their sum.

    Raises:
        ValueError: If they are not positive numbers that sum to 1, one an expert.
    """
    tensors = (t for e in energies for t in (*e.parameters(), *e.buffers()))
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    number = len(energies)
    if weights is None:
        return like.new_full((number,), 1 / number)
    weights = torch.as_tensor(weights).to(like)
    if weights.shape != (number,) or not (
        (weights > 0).all() and abs(weights.sum() - 1) < 1e-4
    ):
        raise ValueError(
            f"weights must be {number} positive numbers that sum to 1, one for each "
            f"expert, got {weights}. Divide them by their sum; while learning, take "
            "logits.softmax(-1); leave out an expert of weight 0."
        )
    return weights / weights.sum()


def _stacked(experts: Sequence[Any], name: str, like: Tensor) -> Tensor:
    """An attribute of each expert, 0 where a Pyro distribution has none."""
    values = (getattr(expert, name, 0.0) for expert in experts)
    return torch.stack([torch.as_tensor(value).to(like) for value in values])
