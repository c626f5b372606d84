r"""Log-weights of draws of a guide, by runs of guide and model.

.. math::
    \log w_n = \log p(y, z_n) - \log q(z_n), \qquad z_n \sim q                \tag{1}

They need nothing of the model but that it runs: discrete latent sites, branches on
latent values and code outside of torch are all allowed.
"""

__all__ = [
    "GuideRuns",
    "check_guide",
    "is_auxiliary",
    "latent_sites",
    "plate_nesting",
]

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoDelta
from pyro.infer.importance import vectorized_importance_weights
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_ebm.energies.corrections import without_independent
from pyro_ebm.energies.graphs.recording import LinAlgError
from pyro_ebm.energies.pyro_model.checks import check_log_partitions
from pyro_ebm.energies.pyro_model.runs import retried

#: Draws of the vectorised run that are done again one by one.
_NUM_CHECKED = 4


class _Traces(NamedTuple):
    guide: Trace
    model: Trace

    def log_weight(self) -> Tensor:
        difference = self.model.log_prob_sum() - self.guide.log_prob_sum()  # (1)
        return torch.as_tensor(difference)


class GuideRuns:
    """Log-weights (1), one or many at a time.

    Many draws are made at once inside one more plate. Code that is not written for that
    may fail or, worse, give wrong weights without a word; so some draws are done again
    one by one and compared, and where they differ all are done one by one.

    A run that raises ``ValueError`` or ``LinAlgError``, as at a covariance that is not
    positive definite, is a draw of weight zero, and counted.

    Args:
        model: A Pyro model.
        guide: Over its latent sites; ``None`` proposes from the prior.
        args: Arguments of both.
        kwargs: Arguments of both.

    Attributes:
        is_vectorized: Whether many draws are made at once.
        why_not: Why they are not; empty if they are.
        num_failed: Runs that raised, so far.

    Raises:
        ValueError: If guide and model do not have the same latent sites, a plate is
            subsampled, or an energy does not know its log Z.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if guide is None:
            guide = poutine.block(model, hide_types=["observe"])
        self.model, self.guide = model, guide
        self.args, self.kwargs = args, kwargs
        self.num_failed = 0
        self.example = retried(self._trace)
        _check_sites(self.example)
        self.max_plate_nesting = max(map(plate_nesting, self.example))
        self.why_not = self._problem_with_vectorizing()
        self.is_vectorized = not self.why_not

    def draw(self, count: int) -> Tensor:
        """Log-weights of new draws, shape ``(count,)``."""
        if self.is_vectorized:
            try:
                return self._many(count)[0]
            except (ValueError, LinAlgError):  # one of them: find out which
                pass
        return torch.stack([self._one() for _ in range(count)])

    def _trace(self, values: Trace | None = None) -> _Traces:
        """One draw of the guide, or one with the given values."""
        guide = self.guide if values is None else poutine.replay(self.guide, values)
        guide_trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        model = poutine.replay(self.model, guide_trace)
        model_trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        return _Traces(guide_trace, model_trace)

    def _one(self) -> Tensor:
        """Log-weight of one draw, shape ``()``."""
        try:
            return self._trace().log_weight()
        except (ValueError, LinAlgError):
            self.num_failed += 1
            return torch.tensor(-torch.inf)

    def _many(self, count: int) -> tuple[Tensor, Trace]:
        """Log-weights of many draws, shape ``(count,)``, and the draws."""
        log_weights, _, guide_trace = vectorized_importance_weights(
            self.model,
            self.guide,
            *self.args,
            num_samples=count,
            max_plate_nesting=self.max_plate_nesting,
            **self.kwargs,
        )
        return torch.as_tensor(log_weights).reshape(-1), guide_trace

    def _problem_with_vectorizing(self) -> str:
        """Why it cannot be done, or an empty string."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._compare(*self._many(_NUM_CHECKED))
        except Exception as error:  # the code may raise anything
            return f"{type(error).__name__}: {error}"

    def _compare(self, log_weights: Tensor, draws: Trace) -> str:
        """Where draws differ from what they are one by one, or an empty string."""
        if log_weights.shape != (_NUM_CHECKED,):
            return f"the weights of {_NUM_CHECKED} draws have {len(log_weights)} values"
        for n, log_weight in enumerate(log_weights):
            values = self._pick(draws, n)
            if values is None:
                return "a site has another shape when many draws are made at once"
            expected = self._trace(values).log_weight().to(log_weight)
            tolerance = 1e-3 if log_weight.dtype == torch.float32 else 1e-6
            if not torch.isclose(
                log_weight, expected, rtol=tolerance, atol=tolerance, equal_nan=True
            ):
                return (
                    f"a draw has log-weight {log_weight.item():.6g} among many, and "
                    f"{expected.item():.6g} by itself"
                )
        return ""

    def _pick(self, draws: Trace, n: int) -> Trace | None:
        """Trace of the guide that holds the ``n``-th of many draws."""
        picked = self.example.guide.copy()
        for name, site in latent_sites(picked).items():
            value: Any = draws.nodes[name]["value"]
            event_dim = site["fn"].event_dim
            axis = value.dim() - event_dim - self.max_plate_nesting - 1
            if axis >= 0 and value.shape[axis] > 1:
                value = value.select(axis, n)
            if value.numel() != site["value"].numel():
                return None
            site["value"] = value.reshape(site["value"].shape)
        return picked


def latent_sites(trace: Trace) -> dict[str, Any]:
    """The latent sites of a trace by name."""
    nodes = trace.nodes.items()
    return {
        name: site
        for name, site in nodes
        if site["type"] == "sample"
        and not site["is_observed"]
        and type(site["fn"]).__name__ != "_Subsample"
    }


def is_auxiliary(site: Any) -> bool:
    """Whether a site of a guide only helps, and is none of the model."""
    return bool(site["infer"].get("is_auxiliary"))


def check_guide(guide: Any, trace: Trace) -> None:
    """Check that a guide has a density: no site of it is a point, no energy bare.

    Args:
        guide: A Pyro guide.
        trace: A run of it.

    Raises:
        ValueError: If it has none.
    """
    check_log_partitions(trace)
    modules = guide.modules() if isinstance(guide, nn.Module) else ()
    sites = latent_sites(trace).values()
    helpers = [site for site in sites if is_auxiliary(site)]
    # Behind helpers a Delta carries their density to where the model has its site.
    points = [site["name"] for site in helpers or sites if _is_point(site["fn"])]
    if points or any(isinstance(module, AutoDelta) for module in modules):
        where = f", at the sites {points}" if points else ""
        raise ValueError(
            f"guide must have a density, and {type(guide).__name__} is a point{where}. "
            "Take AutoNormal or AutoMultivariateNormal; of an AutoLaplaceApproximation "
            "its .laplace_approximation(); or no guide at all."
        )


def _is_point(fn: Any) -> bool:
    return isinstance(without_independent(fn), dist.Delta)


def _check_sites(traces: _Traces) -> None:
    """Check that guide and model have the same latent sites, all the data and log Z.

    Raises:
        ValueError: If not.
    """
    guide, model = latent_sites(traces.guide), latent_sites(traces.model)
    known = {name for name, site in guide.items() if is_auxiliary(site)}
    missing, extra = model.keys() - guide.keys(), guide.keys() - model.keys() - known
    if missing or extra:
        raise ValueError(
            "guide must have the latent sites of the model: "
            f"missing are {sorted(missing)}, not in the model are {sorted(extra)}. "
            'Mark a site that only helps with infer={"is_auxiliary": True}.'
        )
    for trace in traces:
        check_log_partitions(trace)
        for name, site in trace.nodes.items():
            for frame in site.get("cond_indep_stack", ()):
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"plate {frame.name!r} around {name!r} must hold all "
                        f"{frame.full_size} rows, got a subsample of {frame.size}, "
                        "whose evidence is biased. Run it without subsample_size."
                    )


def plate_nesting(trace: Trace) -> int:
    """Dimensions to the left of the events that a trace uses."""
    nesting = 0
    sites: list[Any] = list(trace.nodes.values())
    for site in sites:
        if site["type"] == "sample":
            frames = [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
            batch_shape = getattr(site["fn"], "batch_shape", ())  # a plate has none
            nesting = max(nesting, len(batch_shape), *frames)
    return nesting
