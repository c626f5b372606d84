"""The latent sites of a Pyro model, laid end to end in unconstrained space."""

__all__ = ["ModelSites", "find_sites"]

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_ebm.energies.corrections import support_of
from pyro_ebm.energies.pyro_model.markov_chains import ChainEvaluator
from pyro_ebm.energies.pyro_model.missing_data import with_missing_data
from pyro_ebm.energies.pyro_model.model_checks import (
    check_same,
    check_site,
    check_supports,
)
from pyro_ebm.energies.pyro_model.model_runs import (
    Model,
    WithoutValidation,
    initial_value,
    retried,
    run_model,
    samples,
)
from pyro_ebm.energies.pyro_model.whole_plates import check_rows, whole_plates


class ModelSites(NamedTuple):
    """The continuous latent sites, in the order in which the model samples them.

    Attributes:
        shapes: Shape of each site's value.
        flat_shapes: The same in unconstrained space.
        transforms: From each site's unconstrained to its constrained values.
        potential: Pyro's potential: a dict of unconstrained values to minus the log
            joint density, shape ``()``.
        max_plate_nesting: Dimensions that the plates of the model take.
        example: A vector of zeros like the unconstrained values, shape ``(D,)``.
    """

    shapes: dict[str, torch.Size]
    flat_shapes: dict[str, torch.Size]
    transforms: dict[str, Transform]
    potential: Callable[[dict[str, Tensor]], Tensor]
    max_plate_nesting: int
    example: Tensor

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Each site's part of ``u``: ``(*batch, D)`` to ``(*batch, *flat_shape)``."""
        parts = u.split([shape.numel() for shape in self.flat_shapes.values()], -1)
        return {
            name: part.reshape(u.shape[:-1] + shape)
            for (name, shape), part in zip(self.flat_shapes.items(), parts, strict=True)
        }

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the sites: ``(*batch, D)`` to ``(*batch, *site_shape)``."""
        return {n: self.transforms[n](part) for n, part in self.split(u).items()}

    def unconstrain(
        self, values: Mapping[str, Tensor], known: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Inverse of :meth:`constrain`.

        Args:
            values: Of each site.
            known: Unconstrained values of some sites, in place of the inverse.
        """
        parts = []
        for name, shape in self.shapes.items():
            if name not in values:
                raise ValueError(
                    f"values must hold every latent site, {list(self.shapes)}; "
                    f"{name!r} is missing."
                )
            value = torch.as_tensor(values[name])
            batch_dim = value.dim() - len(shape)
            if batch_dim < 0 or value.shape[batch_dim:] != shape:
                raise ValueError(
                    f"site {name!r} must have shape (*batch, *{tuple(shape)}), got "
                    f"{tuple(value.shape)}."
                )
            flat = known.get(name) if known else None
            if flat is None:
                flat = self.transforms[name].inv(value)
            size = self.flat_shapes[name].numel()
            parts.append(flat.reshape(value.shape[:batch_dim] + (size,)))
        batch_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([p.expand(*batch_shape, p.shape[-1]) for p in parts], -1)

    def log_abs_det(self, u: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Log-volume of :meth:`constrain` at ``u``, shape ``(*batch,)``."""
        total = u.new_zeros(u.shape[:-1])
        for name, part in self.split(u).items():
            volume = self.transforms[name].log_abs_det_jacobian(part, values[name])
            total = total + sum_rightmost(volume, volume.dim() - total.dim())
        return total

    def energy(self, u: Tensor) -> Tensor:
        """Pyro's potential at one ``u`` of shape ``(D,)``, shape ``()``."""
        with poutine.block(), WithoutValidation():
            return self.potential(self.split(u))


def find_sites(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelSites:
    """Run the model a few times, and check that it is one that an energy can hold.

    Raises:
        ValueError: If there is no continuous latent site, the sites differ from run to
            run, or an observed value is nan or the same for all rows of a plate that is
            subsampled.
        NotImplementedError: If a discrete site cannot be enumerated, a plate is
            subsampled in a way that cannot be undone, or a support depends on others.
    """
    model = whole_plates(with_missing_data(model))
    first = run_model(model, args, kwargs)
    check_rows(first)
    for name, site in samples(first):
        check_site(name, site)
    check_same(first, run_model(model, args, kwargs))
    sites = _continuous(first)
    transforms = {n: biject_to(support_of(s["fn"])) for n, s in sites.items()}
    nesting = _max_plate_nesting(first)
    _, potential, _, enumerated = retried(
        lambda: initialize_model(
            model,
            args,
            kwargs,
            transforms={name: transform.inv for name, transform in transforms.items()},
            max_plate_nesting=nesting,
            init_strategy=initial_value,
            initial_params={},  # else Pyro would look for some, in 100 runs at most
        )
    )
    check_supports(first, enumerated)
    maker: Any = potential.__self__
    maker.trace_prob_evaluator = ChainEvaluator(maker.trace_prob_evaluator)
    values = {name: site["value"].detach() for name, site in sites.items()}
    flat = {name: transforms[name].inv(value) for name, value in values.items()}
    return ModelSites(
        {name: value.shape for name, value in values.items()},
        {name: value.shape for name, value in flat.items()},
        transforms,
        potential,
        nesting,
        torch.zeros_like(torch.cat([value.reshape(-1) for value in flat.values()])),
    )


def _continuous(trace: Trace) -> dict[str, Any]:
    latent = {n: site for n, site in samples(trace) if not site["is_observed"]}
    sites = {n: s for n, s in latent.items() if not s["fn"].support.is_discrete}
    if not sites:
        raise ValueError(
            "model must have at least one continuous latent site; it has "
            + (f"only discrete ones, {list(latent)}." if latent else "none at all.")
            + " Leave out the obs of what is to be inferred."
        )
    return sites


def _max_plate_nesting(trace: Trace) -> int:
    dims = [
        frame.dim
        for _, site in samples(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)
