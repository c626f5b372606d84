r"""A distribution given a part of its event: inpainting.

.. math::
    q(u \mid v) = e^{-f(u, v)} / Z_v, \qquad Z_v = Z\, q(v)                 \tag{1}

Conditioning is easy for an energy: what is observed is put in, and only the partition
function is another one. (Marginals are easy for draws: ``p.sample(shape)[..., index]``
has the distribution of the coordinates ``index``, the others integrated out.) An
observation with noise is no part of the event, and needs no operator: it is a second
``pyro.sample`` site, with ``obs``, after that of the energy.
"""

__all__ = ["Conditional"]

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, final

import pyro.distributions as dist
from torch import Tensor

from pyro_ebm.bases.mixed import LatentClasses
from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.mixture import MixtureOfExperts
from pyro_ebm.distributions.representation import distribution_html
from pyro_ebm.energies import ClampedEnergy
from pyro_ebm.energies.closed_form.marginal import marginal
from pyro_ebm.mcmc import ImportanceResampling, IndependentChains, Sampler
from pyro_ebm.partition import LogPartitionEstimate


@final
class Conditional(EnergyDistribution):
    r"""The distribution (1) of the coordinates that are free, given the others.

    Usually written ``p.condition({index: value})``. The event is one vector of the free
    coordinates, in the order of the flattened event; one value holds for all draws.
    Parameters of ``p`` stay live.

    Where ``p`` is Gaussian, a mixture of Gaussians or independent, :math:`\log Z_v` is
    exact, and so it is of at most 4096 states of categorical columns given real ones.
    Otherwise it is unknown until it is given (``partition.estimate`` of the
    conditional, and :meth:`with_log_partition`). :math:`\log Z_v - \log Z` is
    :math:`\log q(v)`, the log marginal density of what is observed.

    Args:
        distribution: What is conditioned, with an empty batch shape.
        observed: Indices and values, see :class:`~pyro_ebm.energies.ClampedEnergy`.
        log_partition: :math:`\log Z_v`; see :class:`EnergyDistribution`.
        base: Normalised, over the free coordinates: start of chains, reference for
            :math:`\log Z_v`. Default: the marginal of the base that ``distribution``
            has, where that is normal, independent or a mixture of such, of latent
            classes their conditional, else none:
            then chains start standard normal, and ``partition.estimate`` asks for one.
        sampler: How to draw; default: as ``distribution`` does, but from ``base``, or
            exactly where :math:`q(u \mid v)` is known.
        validate_args: Whether ``log_prob`` checks its argument; Pyro's default.

    Raises:
        TypeError: If ``distribution`` is no :class:`EnergyDistribution`.
        ValueError: If it has a batch shape, if ``observed`` does not fit, or if its
            sampler needs a base and none can be derived.
        NotImplementedError: If the support is discrete, or ties coordinates together.

    Exactness: as :class:`EnergyDistribution`.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(
        ...     torch.zeros(2), torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
        ... )
        >>> p = pyro_ebm.EnergyDistribution(energy)
        >>> given = p.condition({0: 1.0})
        >>> given.closed_form().distribution.mean
        tensor([0.5000], grad_fn=<ExpandBackward0>)
        >>> given.expand_event(given.sample((3,))).shape
        torch.Size([3, 2])
        >>> p.sample((3,))[..., 1].shape  # the marginal of the second coordinate
        torch.Size([3])
    """

    energy: ClampedEnergy

    def __init__(
        self,
        distribution: EnergyDistribution,
        observed: "Mapping[Any, Any] | Iterable[tuple[Any, Any]]",
        log_partition: "float | Tensor | LogPartitionEstimate | None" = None,
        *,
        base: dist.TorchDistribution | None = None,
        sampler: Sampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(distribution, EnergyDistribution):
            raise TypeError(
                "distribution must be an EnergyDistribution, got "
                f"{type(distribution).__name__}. A Pyro distribution becomes one as "
                "EnergyDistribution(DistributionEnergy(distribution))."
            )
        if distribution.batch_shape:
            raise ValueError(
                "distribution must have an empty batch_shape to be conditioned, got "
                f"{tuple(distribution.batch_shape)}. Condition first, then expand."
            )
        energy = ClampedEnergy(distribution.energy, observed)
        known = energy.closed_form()
        if log_partition is None and known is not None:
            log_partition = known.log_partition
        classes = _latent_classes_of(distribution)
        near = None if classes is None else classes.given(energy.fixed, energy.value)
        if base is None and near is not None:
            base = near
            sampler = ImportanceResampling(near) if sampler is None else sampler
        base = _derived_base(distribution, energy) if base is None else base
        if sampler is None and known is None:
            sampler = _sampler_from(distribution.sampler, base)
        super().__init__(
            energy, log_partition, sampler=sampler, validate_args=validate_args
        )
        #: Reference for the log partition function and start of chains, or ``None``.
        self.base = base

    def expand_event(self, u: Tensor) -> Tensor:
        """Put the observed values back.

        Args:
            u: The free coordinates, shape ``(*sample, *batch, U)``, as drawn.

        Returns:
            Events of the distribution that was conditioned, shape
            ``(*sample, *batch, *event)``.
        """
        return self.energy.expand_event(u)

    def with_log_partition(
        self, log_partition: "float | Tensor | LogPartitionEstimate"
    ) -> "Conditional":
        r"""The same conditional, normalised.

        Args:
            log_partition: :math:`\log Z_v`; see :class:`EnergyDistribution`.

        Example:
            >>> ring = pyro_ebm.energies.FunctionEnergy(
            ...     lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,)
            ... )
            >>> given = pyro_ebm.EnergyDistribution(ring).condition({0: 1.0})
            >>> estimate = pyro_ebm.partition.estimate(given)
            >>> given.with_log_partition(estimate).is_normalized
            True
        """
        known = EnergyDistribution(self.energy, log_partition)
        new: Any = self.expand(self.batch_shape)
        for name in ("log_partition", "log_partition_std_error", "is_normalized"):
            setattr(new, name, getattr(known, name))
        return new

    def _formula(self) -> str:
        energy = self.energy
        return f"{type(energy.energy).__name__} | {len(energy.fixed)} observed"

    def _repr_html_(self) -> str:
        return distribution_html(self, f"exp(-f(u, v)) / Z_v, f: {self._formula()}")


def _latent_classes_of(distribution: EnergyDistribution) -> LatentClasses | None:
    """The base of a mixed event, whose conditional is known as well."""
    holders = (distribution, distribution.owner, distribution.sampler)
    found = [getattr(h, name, None) for h in holders for name in ("base", "proposal")]
    parts = [part for each in found for part in getattr(each, "parts", (each,))]
    return next((part for part in parts if isinstance(part, LatentClasses)), None)


def _derived_base(
    distribution: EnergyDistribution, energy: ClampedEnergy
) -> dist.TorchDistribution | None:
    """The marginal of the base: wider than its conditional, as a base should be."""
    holders = (distribution, distribution.owner, distribution.sampler)
    bases = (getattr(holder, "base", None) for holder in holders)
    whole = next((base for base in bases if base is not None), None)
    if not isinstance(whole, MixtureOfExperts):
        return None if whole is None else marginal(whole, energy.free)
    parts = [marginal(expert, energy.free) for expert in whole.experts]
    known = [part for part in parts if part is not None]
    return MixtureOfExperts(known, whole.weights) if len(known) == len(parts) else None


def _sampler_from(sampler: Any, base: dist.TorchDistribution | None) -> Sampler:
    """The same sampler from another base, if it is one that has a base."""
    if not dataclasses.is_dataclass(sampler) or not hasattr(sampler, "base"):
        return IndependentChains(base=base)
    if base is None and not isinstance(sampler, IndependentChains):
        raise ValueError(
            f"base must be given: {type(sampler).__name__}, the sampler of the "
            "distribution that is conditioned, needs one, and no marginal of its own "
            "is known. Take a normalised Pyro distribution over the free coordinates."
        )
    changed: Any = dataclasses.replace(sampler, base=base)  # type: ignore[type-var]
    return changed


EnergyDistribution._condition = Conditional
