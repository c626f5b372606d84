"""Neural spline flows, by zuko."""

__all__ = ["Flow", "flow"]

import copy
from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from tqdm.auto import tqdm

from pyro_ebm.bases.rows import Rows, split
from pyro_ebm.core.stopwatch import Stopwatch
from pyro_ebm.core.validation import without_validation

#: Of the optimiser; steps between two looks at the held-out rows, and looks without a
#: better one after which it ends.
_RATE, _BATCH, _EVERY, _PATIENCE = 1e-3, 256, 50, 20


def flow(
    data: Tensor,
    *,
    support: Constraint | None = None,
    num_transforms: int = 3,
    hidden_features: Sequence[int] = (64, 64),
    max_seconds: float = 20.0,
    seed: int = 0,
    progress_bar: bool = True,
) -> dist.TorchDistribution:
    """A neural spline flow that was fitted to 85 % of the rows, and chosen by the rest.

    Args:
        data: Shape ``(N, *event)``.
        support: Of a row; the flow is then in unconstrained space, pushed to the
            support. Default: all real numbers.
        num_transforms: Of the flow.
        hidden_features: Widths of the hidden layers of each transform.
        max_seconds: Seconds after which the best flow so far is taken.
        seed: Of the held-out rows, the first weights and the batches.
        progress_bar: Whether to show the steps, if it takes more than a second.

    Returns:
        A normalised Pyro distribution over the event, with frozen parameters; its
        innermost distribution has the network as ``module``.

    Raises:
        ImportError: If zuko is not installed.
        ValueError: If the data do not fit, see :class:`~pyro_ebm.bases.rows.Rows`.

    Exactness: the best of a stochastic optimisation.

    References:
        Durkan, Bekasov, Murray & Papamakarios (2019), NeurIPS 32.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> base = flow(torch.randn(200, 2), max_seconds=0.2, progress_bar=False)
        >>> base.log_prob(base.sample((5,))).shape
        torch.Size([5])
    """
    rows = Rows.of(data, support)
    dim = rows.u.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [dim, num_transforms, *hidden_features]
        module = _module(sizes).to(rows.u)
        loc, scale = rows.u.mean(0), rows.u.std(0)
        scale = scale.where(scale > 0, 1.0)
        _train(module, (rows.u - loc) / scale, max_seconds, seed, is_shown=progress_bar)
    module.requires_grad_(requires_grad=False)
    return rows.distribution(Flow(module, sizes, loc, scale))


def _module(sizes: Sequence[int]) -> nn.Module:
    try:
        with without_validation():  # zuko switches all checks off
            import zuko
    except ImportError as error:
        message = "flow needs zuko: pip install 'pyro-ebm[flows]'."
        raise ImportError(message) from error
    dim, num_transforms, *hidden = sizes
    module: nn.Module = zuko.flows.NSF(
        dim, transforms=num_transforms, hidden_features=tuple(hidden)
    )
    return module


def _train(
    module: nn.Module, z: Tensor, max_seconds: float, seed: int, *, is_shown: bool
) -> None:
    """Maximum likelihood, stopped early."""
    train, held_out = split(z, seed)
    optimiser = torch.optim.Adam(module.parameters(), _RATE)
    best, state, waited = torch.inf, copy.deepcopy(module.state_dict()), 0
    watch = Stopwatch()
    with tqdm(desc="flow", delay=1, disable=not is_shown) as bar:
        while watch.seconds < max_seconds and waited < _PATIENCE:
            for _ in range(_EVERY):
                if watch.seconds > max_seconds:  # a step of many columns takes long
                    break
                batch = train[torch.randint(len(train), (_BATCH,))]
                loss = -module().log_prob(batch).mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 10.0)
                optimiser.step()
                bar.update()
            with torch.no_grad():
                score = -module().log_prob(held_out).mean().item()
            bar.set_postfix_str(f"held-out {-score:.3f}")
            waited = 0 if score < best else waited + 1
            if score < best:
                best, state = score, copy.deepcopy(module.state_dict())
    module.load_state_dict(state)


@final
class Flow(dist.TorchDistribution):
    """A flow of zuko over standardised vectors, as a Pyro distribution.

    Args:
        module: The flow over ``(D,)``.
        sizes: ``D``, the number of its transforms, and the widths of hidden layers.
        loc: Mean of the rows, shape ``(D,)``.
        scale: Their standard deviations.
    """

    arg_constraints: dict[str, Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, module: nn.Module, sizes: Sequence[int], loc: Tensor, scale: Tensor
    ) -> None:
        super().__init__(torch.Size(), loc.shape, validate_args=False)
        self.module, self.sizes = module, list(sizes)
        self.loc, self.scale = loc, scale

    def saved(self) -> dict[str, Any]:
        """What :meth:`restored` builds it from."""
        return {
            "sizes": self.sizes,
            "module": dict(self.module.state_dict()),
            "loc": self.loc,
            "scale": self.scale,
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Flow":
        """The flow that :meth:`saved` describes.

        Raises:
            ImportError: If zuko is not installed.
        """
        module = _module(state["sizes"]).to(state["loc"])
        module.load_state_dict(state["module"])
        module.requires_grad_(requires_grad=False)
        return cls(module, state["sizes"], state["loc"], state["scale"])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``(*batch, D)``, shape ``(*batch,)``."""
        inner: Any = self.module()
        z = (value - self.loc) / self.scale
        result: Tensor = inner.log_prob(z) - self.scale.log().sum()
        return result

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``(*sample, D)``."""
        inner: Any = self.module()
        z: Tensor = inner.rsample(torch.Size(sample_shape))
        return self.loc + self.scale * z
