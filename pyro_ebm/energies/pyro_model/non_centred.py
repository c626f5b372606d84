r"""Non-centred parametrisation of normal sites whose scale is latent.

The values :math:`x` of a group with a common scale, :math:`x_i \sim
\mathcal{N}(\mu, \tau)`, are pressed together where :math:`\tau` is small: a funnel, in
which no step size fits. In

.. math::
    x_i = \mu + \tau z_i, \qquad z_i \sim \mathcal{N}(0, 1)                \tag{1}

:math:`z` and :math:`\tau` are independent unless the data tell :math:`x` well, in which
case the funnel is there instead. Of a multivariate normal :math:`\tau` is the Cholesky
factor of its covariance, as where slopes and intercepts vary together. Points :math:`v`
with :math:`z` in the place of :math:`x` have the same layout as those of the model,
:math:`u = T(v)`, and

.. math::
    f_v(v) = f(T(v)) - \log\left|\det \frac{\partial T}{\partial v}\right|,
    \qquad \nabla f_v = J_T^\top \nabla f - \nabla \log|\det J_T|          \tag{2}

References:
    Papaspiliopoulos, Roberts & Skold (2007), Statistical Science 22, 59-73.
"""

__all__ = ["NonCentring", "sites_to_standardise"]

import contextlib
from collections.abc import Sequence
from typing import Any, TypeAlias, cast, final

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyro_ebm.energies.corrections import without_independent
from pyro_ebm.energies.pyro_model.energy import PyroModelEnergy
from pyro_ebm.energies.pyro_model.full_data import has_whole_plates
from pyro_ebm.energies.pyro_model.runs import WithoutValidation, samples

_Normal: TypeAlias = Normal | MultivariateNormal
#: Points that are mapped at a time.
_CHUNK = 4096


def sites_to_standardise(energy: PyroModelEnergy) -> tuple[str, ...]:
    """Latent normal sites whose scale depends on other latent sites.

    None where the model has discrete latent sites, or plates that subsample.
    """
    with torch.random.fork_rng(devices=[]):
        first = energy.run()
        torch.rand(())  # each run begins where the generator is
        second = energy.run()
    latent = [(n, site) for n, site in samples(first) if not site["is_observed"]]
    is_continuous = all(name in energy.site_shapes for name, _ in latent)
    if not is_continuous or not has_whole_plates(first):
        return ()
    found = []
    for name, site in latent:
        one, other = (_normal(trace.nodes[name]["fn"]) for trace in (first, second))
        is_weighted = bool((torch.as_tensor(site["scale"]) != 1).any())
        if one is None or other is None or is_weighted or site["mask"] is not None:
            continue
        if not torch.equal(_scale(one), _scale(other)):
            found.append(name)
    return tuple(found)


def _normal(fn: Any) -> _Normal | None:
    fn = without_independent(fn)
    return fn if isinstance(fn, _Normal) else None


def _scale(normal: _Normal) -> Tensor:
    return normal.scale if isinstance(normal, Normal) else normal.scale_tril


def _from_standard(normal: _Normal, z: Tensor) -> Tensor:
    if isinstance(normal, Normal):
        return normal.loc + normal.scale * z  # (1)
    return normal.loc + (normal.scale_tril @ z[..., None])[..., 0]


def _to_standard(normal: _Normal, x: Tensor) -> Tensor:
    if isinstance(normal, Normal):
        return (x - normal.loc) / normal.scale
    rest = (x - normal.loc)[..., None]
    return torch.linalg.solve_triangular(normal.scale_tril, rest, upper=False)[..., 0]


class _Standard(LocScaleReparam):
    """Pyro's own for normal sites, and the same of multivariate normal ones."""

    def apply(self, msg: Any) -> Any:
        normal, value = cast(_Normal, _normal(msg["fn"])), msg["value"]
        if isinstance(normal, Normal):
            return super().apply(msg)
        unit = dist.Normal(normal.loc.new_zeros(()), 1.0).expand(msg["fn"].shape())
        infer: Any = {"is_observed": msg["is_observed"]}
        z = None if value is None else _to_standard(normal, value)  # an initial one's
        name = f"{msg['name']}_decentered"
        z = pyro.sample(name, unit.to_event(msg["fn"].event_dim), obs=z, infer=infer)
        value = _from_standard(normal, z) if value is None else value
        fn = dist.Delta(value, event_dim=msg["fn"].event_dim).mask(mask=False)
        return {"fn": fn, "value": value, "is_observed": True}


class _WithoutScope(Messenger):
    """Leaves out what Pyro keeps under ``pyro.markov`` of sites to be enumerated.

    None is here, and it would look for sites that have given way to standardised ones.
    """

    def _pyro_sample(self, msg: Any) -> None:
        msg["infer"].pop("_markov_scope", None)


class _Standardised(Messenger):
    """Takes the values of some sites for standardised ones, or standardises them.

    Attributes:
        values: Values of these sites, then what they became.
        log_det: Of (1), shape ``()``.
    """

    def __init__(self, values: dict[str, Tensor], *, inverse: bool) -> None:
        super().__init__()
        self.values, self.inverse = values, inverse
        self.log_det: Tensor | float = 0.0
        self._left = set(values)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._left:
            return
        normal = cast(Normal, _normal(msg["fn"]))
        given, scale = self.values[name], _scale(normal)
        moved = (_to_standard if self.inverse else _from_standard)(normal, given)
        msg["value"], msg["done"] = given if self.inverse else moved, True
        self.values[name] = moved
        if isinstance(normal, MultivariateNormal):
            scale = scale.diagonal(dim1=-2, dim2=-1)
        self.log_det = self.log_det + scale.log().expand(given.shape).sum()

    def _pyro_post_sample(self, msg: Any) -> None:
        self._left.discard(msg["name"])
        if not self._left:  # the likelihood has no say
            raise _Done


class _Done(Exception):  # noqa: N818
    pass


@final
class NonCentring:
    """The map (1) of some sites of a model, and the energy (2).

    Args:
        centred: The energy of the model.
        sites: Of those of :func:`sites_to_standardise`.

    Raises:
        RuntimeError: If the model cannot be run at many points at once.

    Example:
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1))
        >>> centred = pyro_ebm.energies.PyroModelEnergy(model)
        >>> map = NonCentring(centred, ["x"])
        >>> v = torch.tensor([[0.0, 1.0, 2.0, 3.0], [2.0, 1.0, 2.0, 3.0]])
        >>> map.to_model(v)[1, 1:] / v[1, 1:] / torch.tensor(2.0).exp()
        tensor([1.0000, 1.0000, 1.0000])
    """

    def __init__(self, centred: PyroModelEnergy, sites: Sequence[str]) -> None:
        self.centred, self.sites = centred, tuple(sites)
        like = torch.zeros(2, *centred.event_shape, **centred.tensor_options())
        points = torch.linspace(-1, 1, like.numel()).reshape(like.shape).to(like)
        points = points.to(centred.model_dtype)
        with torch.no_grad():
            alone = [self._moved(point, inverse=False)[0] for point in points]
        together = self.to_model(points)
        if not torch.allclose(together, torch.stack(alone), rtol=1e-4, atol=1e-5):
            raise RuntimeError("the model gives other values at many points at once.")

    def energy(self) -> PyroModelEnergy:
        """The energy (2). Exactness: *exact*; its :math:`Z` is that of the model."""
        changes: Any = {name: _Standard(centered=0.0) for name in self.sites}
        moved = poutine.reparam(self.centred.model, changes)
        return self.centred.of_model(_WithoutScope()(moved))

    @torch.no_grad()
    def to_model(self, v: Tensor) -> Tensor:
        """Points of the model, ``(*batch, D)``, from those of the energy (2)."""
        return self._many(v, inverse=False)

    @torch.no_grad()
    def from_model(self, u: Tensor) -> Tensor:
        """The inverse of :meth:`to_model`."""
        return self._many(u, inverse=True)

    def gradient(self, v: Tensor, grad: Tensor) -> Tensor:
        """The gradient (2) from that of the model at ``T(v)``, shape ``(N, D)``."""

        def one(v: Tensor, grad: Tensor) -> Tensor:
            pair: Any = torch.func.vjp(lambda v: self._moved(v, inverse=False), v)
            (_, log_det), pull = pair
            moved: Tensor = pull((grad, -torch.ones_like(log_det)))[0]  # (2)
            return moved

        many = torch.func.vmap(one, randomness="different")
        own = self.centred.model_dtype
        return many(v.to(own), grad.to(own)).to(grad)

    def _many(self, points: Tensor, *, inverse: bool) -> Tensor:
        flat = points.reshape(-1, points.shape[-1]).to(self.centred.model_dtype)
        if not len(flat):
            return points
        one = torch.func.vmap(
            lambda point: self._moved(point, inverse=inverse)[0], randomness="different"
        )
        moved = torch.cat(list(map(one, flat.split(_CHUNK))))
        return moved.reshape(points.shape).to(points)

    def _moved(self, point: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """One point, and the log-volume of (1) there."""
        values = self.centred.constrain(point)
        own = {name: values.pop(name) for name in self.sites}
        moved = _Standardised(own, inverse=inverse)
        with poutine.block(), WithoutValidation(), contextlib.suppress(_Done):
            with moved, poutine.condition(data=values):
                self.centred.run_under_handlers()
        parts = self.centred.split(point)
        parts = {name: moved.values.get(name, part) for name, part in parts.items()}
        flat = [part.reshape(-1) for part in parts.values()]
        return torch.cat(flat), torch.as_tensor(moved.log_det)
