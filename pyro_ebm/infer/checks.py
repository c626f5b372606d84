"""What would fail silently while an energy is learned, found at its first step."""

__all__ = ["require_learnable"]

import warnings

import pyro
import pyro.nn.module
import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.energy import leaves
from pyro_ebm.errors import UnregisteredParameterWarning
from pyro_ebm.mcmc import IndependentChains


def require_learnable(
    name: str, distribution: EnergyDistribution, latents: list[Tensor]
) -> None:
    """Check the energy at a site.

    Args:
        name: The site.
        distribution: What stands there.
        latents: Values of the latent sites that the model has drawn before.

    Raises:
        NotImplementedError: If the energy depends on a latent variable.

    Warns:
        UnregisteredParameterWarning: If a parameter that the energy depends on is not
            the one in Pyro's parameter store.
    """
    energy = distribution.energy
    sampler = distribution.sampler or IndependentChains()
    # A run that goes on from a state_dict checks again, and draws what the first did.
    device = energy.tensor_options()["device"]
    devices = [device] if device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        x = sampler.start(energy, 1)
        value = energy(x).sum()
    if not value.requires_grad:
        return
    if latents:
        grads = torch.autograd.grad(
            value, latents, allow_unused=True, retain_graph=True
        )
        if any(grad is not None for grad in grads):
            raise NotImplementedError(
                f"the energy at site {name!r} depends on a latent variable, so its log "
                "Z does too: the chains of maximum_likelihood follow one energy only. "
                "Make the energy a function of the pair (an energy of a larger event), "
                "or give an exact or amortised log_partition and no handler."
            )
    if not pyro.nn.module._is_module_local_param_enabled():
        _warn_unregistered(name, distribution, leaves(value, x))


def _warn_unregistered(
    site: str, distribution: EnergyDistribution, parameters: list[Tensor]
) -> None:
    store = pyro.get_param_store()
    names = {id(p): name for name, p in distribution.energy.named_parameters()}
    missing = [
        names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)} in a closure")
        for leaf in parameters
        if store.param_name(leaf) is None
    ]
    if missing:
        warnings.warn(
            f"the energy at site {site!r} has parameters that Pyro does not know, and "
            f"no optimiser will train: {', '.join(missing)}. Call pyro.module(name, "
            "energy_model) in the model, or make the energy an attribute of a "
            "PyroModule. If it was registered under a name in use before, "
            "pyro.clear_param_store() first.",
            UnregisteredParameterWarning,
            stacklevel=2,
        )
