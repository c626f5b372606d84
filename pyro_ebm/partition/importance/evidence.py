r"""Log evidence of a Pyro model by importance sampling from a guide.

.. math::
    \log p(y) \approx \log \frac1N \sum_n
        \frac{p(y, z_n)}{q(z_n)}, \qquad z_n \sim q                         \tag{1}

References:
    Yao, Vehtari, Simpson & Gelman (2018), Yes, but did it work?: Evaluating variational
    inference. ICML.
"""

__all__ = ["importance_sampling_of_model"]

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.infer.importance import vectorized_importance_weights
from pyro.poutine import Trace
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.energies.model_checks import check_log_partitions
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.importance.importance import chunks, estimate_from_weights

#: Draws of the vectorised run that are done again one by one.
_NUM_CHECKED = 4


@torch.no_grad()
def importance_sampling_of_model(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    *args: Any,
    num_samples: int = 10_000,
    batch_size: int = 1_000,
    vectorized: bool | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LogPartitionEstimate:
    r"""Estimate the log evidence of a Pyro model by (1).

    Many draws are made at once inside one more plate. Code that is not written for that
    may fail or, worse, give wrong weights without a word; so some draws are done again
    one by one and compared, and where they differ all are done one by one.

    Args:
        model: Pyro model with observed sites or factors.
        guide: Pyro guide over all latent sites of the model; ``None`` proposes from the
            prior.
        *args: Arguments of both.
        num_samples: Draws; at least 25.
        batch_size: Draws that are made at once.
        vectorized: ``True`` to demand that, ``False`` to go one by one; default: see
            above.
        progress_bar: Whether to show the draws, if it takes more than a second.
        **kwargs: Arguments of both.

    Returns:
        The log evidence with interval and verdict as those of
        :func:`~pyro_ebm.partition.importance_sampling`; one evaluation is one run of
        the model.

    Raises:
        ValueError: If guide and model do not have the same latent sites, a plate is
            subsampled, an energy does not know its log Z, a number is out of range, or
            ``vectorized=True`` cannot be.

    Exactness: *unbiased for Z*, if the guide covers the posterior.

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> estimate = importance_sampling_of_model(model, None)
        >>> abs(estimate.value + 1.2655) < 0.02  # log N(0; 0, 2)
        True
    """
    if num_samples < 25 or batch_size < 1:
        raise ValueError(
            "num_samples must be at least 25 and batch_size at least 1, got "
            f"{num_samples} and {batch_size}."
        )
    if guide is None:
        guide = poutine.block(model, hide_types=["observe"])
    weigher = _Weigher(model, guide, args, kwargs)
    if vectorized is None or vectorized:
        problem = weigher.problem_with_vectorizing()
        if vectorized and problem:
            raise ValueError(
                f"vectorized=True is not possible: {problem}. Write the model for "
                "batched values, or leave vectorized=None."
            )
        vectorized = not problem
    log_weights = weigher.draw(
        num_samples, batch_size if vectorized else None, progress_bar
    )
    how = "vectorised" if vectorized else "one by one"
    method = f"importance sampling from the guide, {how}"
    return estimate_from_weights(log_weights, method, num_samples)


class _Traces(NamedTuple):
    guide: Trace
    model: Trace

    def log_weight(self) -> Tensor:
        difference = self.model.log_prob_sum() - self.guide.log_prob_sum()  # (1)
        return torch.as_tensor(difference)


class _Weigher:
    """Log-weights of draws of the guide, one or many at a time."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.model, self.guide = model, guide
        self.args, self.kwargs = args, kwargs
        self.example = self.trace()
        _check_sites(self.example)
        self.max_plate_nesting = max(map(_plate_nesting, self.example))

    def trace(self, values: Trace | None = None) -> _Traces:
        """One draw of the guide, or one with the given values."""
        guide = self.guide if values is None else poutine.replay(self.guide, values)
        guide_trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        model = poutine.replay(self.model, guide_trace)
        model_trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        return _Traces(guide_trace, model_trace)

    def one(self) -> Tensor:
        """Log-weight of one draw, shape ``()``."""
        return self.trace().log_weight()

    def many(self, count: int) -> tuple[Tensor, Trace]:
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

    def draw(
        self,
        num_samples: int,
        batch_size: int | None,
        progress_bar: bool,  # noqa: FBT001
    ) -> Tensor:
        """Log-weights, shape ``(num_samples,)``, one by one without a batch size."""
        parts = []
        with tqdm(
            total=num_samples, desc="evidence", delay=1, disable=not progress_bar
        ) as bar:
            for count in chunks(num_samples, batch_size or 1):
                parts.append(self.many(count)[0] if batch_size else self.one()[None])
                bar.update(count)
        return torch.cat(parts)

    def problem_with_vectorizing(self) -> str:
        """Why it cannot be done, or an empty string."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                log_weights, draws = self.many(_NUM_CHECKED)
        except Exception as error:  # the code may raise anything
            return f"{type(error).__name__}: {error}"
        if log_weights.shape != (_NUM_CHECKED,):
            return f"the weights of {_NUM_CHECKED} draws have {len(log_weights)} values"
        for n, log_weight in enumerate(log_weights):
            values = self._pick(draws, n)
            if values is None:
                return "a site has another shape when many draws are made at once"
            expected = self.trace(values).log_weight().to(log_weight)
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
        for name, site in _latent(picked).items():
            value: Any = draws.nodes[name]["value"]
            event_dim = site["fn"].event_dim
            axis = value.dim() - event_dim - self.max_plate_nesting - 1
            if axis >= 0 and value.shape[axis] > 1:
                value = value.select(axis, n)
            if value.numel() != site["value"].numel():
                return None
            site["value"] = value.reshape(site["value"].shape)
        return picked


def _latent(trace: Trace) -> dict[str, Any]:
    """The latent sites of a trace by name."""
    nodes = trace.nodes.items()
    return {
        name: site
        for name, site in nodes
        if site["type"] == "sample"
        and not site["is_observed"]
        and type(site["fn"]).__name__ != "_Subsample"
    }


def _check_sites(traces: _Traces) -> None:
    """Check that guide and model have the same latent sites, all the data and log Z.

    Raises:
        ValueError: If not.
    """
    guide, model = _latent(traces.guide), _latent(traces.model)
    known = {name for name, site in guide.items() if site["infer"].get("is_auxiliary")}
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


def _plate_nesting(trace: Trace) -> int:
    """Dimensions to the left of the events that a trace uses."""
    nesting = 0
    sites: list[Any] = list(trace.nodes.values())
    for site in sites:
        if site["type"] == "sample":
            frames = [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
            batch_shape = getattr(site["fn"], "batch_shape", ())  # a plate has none
            nesting = max(nesting, len(batch_shape), *frames)
    return nesting
