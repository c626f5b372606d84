"""What a fit returns, and how it is printed."""

__all__ = ["Anomaly", "FitResult", "FitTimings", "require_counts"]

import textwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ebm.bases import FittedBase
from pyro_ebm.core.html import columns_table, rows_table
from pyro_ebm.core.validation import as_tensor
from pyro_ebm.core.verdict import Finding, Status, in_words
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.fit.diagnosis import (
    FitDiagnostics,
    FitRecord,
)
from pyro_ebm.infer.fit.missing import Imputed, imputed
from pyro_ebm.infer.likelihood import LogLikelihood
from pyro_ebm.partition import LogPartitionEstimate

#: Characters in a printed line.
_WIDTH = 88
#: A space at which no line is broken.
_TIE = "\N{NO-BREAK SPACE}"
#: Records of the history in the table: the last ones, and the first.
_MAX_RECORDS = 6
_HEADER = ("step", "loss", "train", "held out", "log Z", "verdict")


class FitTimings(NamedTuple):
    """What a fit has cost.

    Attributes:
        seconds: Wall-clock time of all of it.
        cpu_seconds: Processor time of this process, all threads together.
        seconds_per_step: Wall-clock time of a parameter step, a mean; with log Z, but
            without records and the end.

    Example:
        >>> FitTimings(seconds=8.0, cpu_seconds=7.5, seconds_per_step=0.004)[0]
        8.0
    """

    seconds: float
    cpu_seconds: float
    seconds_per_step: float


class Anomaly(NamedTuple):
    r"""How unusual points are.

    Attributes:
        score: :math:`-\log q(x)` in nats, shape ``(*batch,)``.
        p_value: Chance of a score at least as large for a point of the data's kind, by
            the rank among the held-out points; at least one over their number.

    Example:
        >>> Anomaly(torch.tensor([9.0]), torch.tensor([0.01])).p_value
        tensor([0.0100])
    """

    score: Tensor
    p_value: Tensor


class FitResult(NamedTuple):
    r"""What a fit returns.

    Attributes:
        distribution: The averaged model with its :math:`\log Z`; or the base that was
            fitted here, where the model is worse.
        log_partition: That :math:`\log Z`, with error and verdict, by
            :func:`pyro_ebm.partition.estimate` if that is reliable, else as tracked.
        history: A record every ``record_interval`` steps.
        num_steps: Parameter steps taken.
        stopped: Why it ended: ``"finished"``, ``"early stopping"``, ``"out of time"``,
            ``"callback"``, ``"interrupted"``, ``"loss not finite"``, or ``"too few
            rows"`` to hold some out, so that nothing was learned beside the base.
        state: What the last objective has learned beside the energy, such as the log Z
            of noise contrast, for the last parameters before averaging.
        train: Log-likelihood of training points, at most 2,000, under the distribution.
        validation: That of the validation points, or ``None``; before the base was
            fitted once more, to them too.
        stages: Name of the objective, and steps taken with it, of each stage.
        timings: Seconds.
        diagnostics: Energy gap, chains, gradients and noise at the end.
        status: ``"ok"`` or ``"unreliable"``.
        reasons: What speaks against the fit, the gravest first, each with a way out;
            empty if the status is ``"ok"``.
        base: The density that was fitted to the data first, and what it was compared
            with; ``None`` where the model had a base.
        held_out_log_prob: :math:`\log q` of the validation points, or ``None``; before
            the base was fitted once more, to them too.

    Example:
        >>> data = torch.randn(500, 2)
        >>> model = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((2,), (8,)))
        >>> noise_contrast = pyro_ebm.infer.NoiseContrastive()
        >>> result = pyro_ebm.fit(
        ...     model, data, noise_contrast, num_steps=10, progress_bar=False
        ... )
        >>> print(result)  # doctest: +ELLIPSIS
        q(x) = exp(-f(x)) / Z, f = NeuralEnergy over (2,)
          log Z = ...
          verdict: ...
          steps: 10 by NoiseContrastive [finished], ... s, ... ms a step
          ...
    """

    distribution: EnergyDistribution
    log_partition: LogPartitionEstimate
    history: list[FitRecord]
    num_steps: int
    stopped: str
    state: nn.Module
    train: LogLikelihood
    validation: LogLikelihood | None
    stages: tuple[tuple[str, int], ...]
    timings: FitTimings
    diagnostics: FitDiagnostics
    status: Status
    reasons: tuple[Finding, ...]
    base: FittedBase | None = None
    held_out_log_prob: Tensor | None = None

    @property
    def gain(self) -> LogLikelihood | None:
        """How much better the model is than its base, on the held-out points.

        These have chosen among its records. ``None`` where there are none.
        """
        return self.diagnostics.gain

    def anomaly(self, x: Any) -> Anomaly:
        r"""How unusual points are, calibrated by the held-out points.

        Args:
            x: Shape ``(*batch, *event)``: a tensor, an array or a table of pandas.

        Returns:
            Scores, and p-values that are uniform on points like the data.

        Raises:
            RuntimeError: If no points were held out.

        Exactness: the p-values are *exact* but for the choice among records, which the
        held-out points have made.

        Example:
            >>> data = torch.randn(200, 2)
            >>> model = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((2,), (8,)))
            >>> result = pyro_ebm.fit(model, data, num_steps=20, progress_bar=False)
            >>> far = result.anomaly(torch.tensor([[6.0, 6.0], [0.0, 0.0]]))
            >>> bool(far.p_value[0] < 0.05), bool(far.p_value[1] > 0.3)
            (True, True)
        """
        known = self.held_out_log_prob
        if known is None:
            raise RuntimeError(
                "no points were held out to calibrate by: give fit validation_data, or "
                "objective='auto' and at least 20 points."
            )
        x = as_tensor("x", x, **self.distribution.energy.tensor_options())
        with torch.no_grad():
            score = -self.distribution.log_prob(x)
        rank = torch.searchsorted((-known).sort().values, score)  # those below
        p_value = (1.0 + len(known) - rank) / (1 + len(known))
        return Anomaly(score, p_value)

    def impute(
        self, x: Any, num_samples: int = 1, num_candidates: int = 256
    ) -> Imputed:
        r"""Draw the missing entries of rows, given the others.

        Candidates come from the conditional of the mixture of normals in the base, and
        are chosen by the weights that make of them draws of the model's.

        Args:
            x: Shape ``(N, D)``, with ``nan`` where an entry is missing: a tensor, an
                array or a table of pandas.
            num_samples: Draws of each row, with repetitions.
            num_candidates: Of each row.

        Returns:
            Draws, means, and how many of the candidates counted.

        Raises:
            TypeError: If the base is of another kind, or over another space.
            ValueError: If ``x`` has another shape, or a count is not positive.

        Exactness: *consistent* in ``num_candidates``; ``effective`` says how many of
        them counted for a row.

        Example:
            >>> data = torch.randn(200, 1) + 0.1 * torch.randn(200, 2)
            >>> model = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((2,), (8,)))
            >>> result = pyro_ebm.fit(model, data, num_steps=20, progress_bar=False)
            >>> found = result.impute(torch.tensor([[1.0, torch.nan]]))
            >>> bool((found.mean[0, 1] - 1).abs() < 0.3)
            True
        """
        shape = self.distribution.event_shape
        x = as_tensor("x", x, **self.distribution.energy.tensor_options())
        if len(shape) != 1 or x.dim() != 2 or x.shape[1:] != shape:
            raise ValueError(
                f"x must have shape (N, *event) with an event of one dimension; the "
                f"event_shape is {tuple(shape)}, got {tuple(x.shape)}."
            )
        require_counts(num_samples=num_samples, num_candidates=num_candidates)
        base = None if self.base is None else self.base.distribution
        energy = self.distribution.energy
        return imputed(base, energy, x, num_samples, num_candidates)

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"ok"``."""
        return self.status.is_reliable

    @property
    def verdict(self) -> str:
        """``"ok"``, or the gravest of what was found, in a few words.

        ``"loss not finite"``; ``"noise too far from data"``, for fewer than 5 effective
        noise points a step, or data told from noise in 99.5 % of pairs; ``"not at
        equilibrium"``, for a drift or an energy gap beyond 4 standard errors that is
        worth 0.05 nats a point (gap squared by twice the variance of the energy), or a
        nested R-hat above 1.05; ``"log Z unknown: run partition.estimate"``; ``"still
        learning"``, for a log-likelihood that rose by 0.05 nats in the last quarter of
        the records.
        """
        return str(self.reasons[0].reason if self.reasons else self.status)

    def _repr_html_(self) -> str:
        return _html(self)

    def __str__(self) -> str:
        energy = self.distribution.energy
        shape, timings = tuple(energy.event_shape), self.timings
        steps = ", then ".join(f"{count:,} by {name}" for name, count in self.stages)
        held_out = "" if self.validation is None else f"held-out: {self.validation}"
        if held_out and self.gain is not None:
            held_out += f"; over its base {_gained(self.gain)}"
        lines = [
            held_out,
            str(self.log_partition),
            f"verdict: {self.verdict}",
            *(f"- {reason}" for reason in self.reasons),
            f"log-likelihood a point of the training data: {self.train}",
            f"steps: {steps} [{self.stopped}], {timings.seconds:.1f} s, "
            f"{1000 * timings.seconds_per_step:.1f} ms a step",
            "" if self.base is None else f"base: {self.base}",
            _described(self.diagnostics),
        ]
        head = f"q(x) = exp(-f(x)) / Z, f = {type(energy).__name__} over {shape}"
        return "\n".join([head, *(_wrapped(line) for line in lines if line)])


def _gained(gain: LogLikelihood) -> str:
    """The gain a point in nats, and in standard errors."""
    text = f"{gain.value:+.3f} +- {gain.std_error:.3f} nats a point"
    if gain.std_error > 0:
        text += f", z = {gain.value / gain.std_error:.1f}"
    return text


def _wrapped(line: str) -> str:
    """Indented, and in several lines where it is too long for one."""
    return textwrap.fill(
        line,
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    ).replace(_TIE, " ")


def _described(found: FitDiagnostics) -> str:
    """What was measured, a name never apart from its number; empty if nothing was."""
    parts = {
        "energy gap": found.energy_gap,
        "gap of what was learned": found.learned_gap,
        "drift of the chains": found.drift,
        "R-hat": _number(found.r_hat, ".3f"),
        "acceptance": _number(found.acceptance, ".2f"),
        "gradient signal to noise": _number(found.gradient_snr, ".2g"),
        "effective noise points a step": _number(found.noise_ess, ",.0f"),
        "passages of a chain": _number(found.crossings, ",.2g"),
        "told from noise": _number(found.noise_separation, ".1%"),
    }
    texts = [f"{k} {v}" for k, v in parts.items() if v is not None]
    return ", ".join(text.replace(" ", _TIE) for text in texts)


def _number(value: float | None, spec: str) -> str | None:
    return None if value is None else format(value, spec)


def _html(result: Any) -> str:
    """How a fit ended, its log Z with the verdict, and how it went."""
    estimate = result.log_partition
    held_out = result.validation
    summary = {
        "model": repr(result.distribution),
        "ended": f"{result.stopped} after {result.num_steps:,} steps",
        "log Z": f"{estimate.value:.4f} +- {estimate.std_error:.4f} nats",
        "log Z verdict": in_words(estimate.status, estimate.reasons),
        "train log-likelihood": f"{result.train} nats a point",
        "held-out log-likelihood": f"{held_out} nats a point" if held_out else "",
        "verdict": ": ".join([result.verdict, *map(str, result.reasons)]),
    }
    table = rows_table("Fit", summary)
    if not result.history:
        return table
    rows = [_cells(record) for record in _shown(result.history)]
    note = f"{len(result.history):,} records, in nats; +- is one standard error"
    return table + columns_table(_HEADER, rows, note)


def _shown(history: Any) -> list[Any]:
    records = list(history)
    if len(records) <= _MAX_RECORDS:
        return records
    return [records[0], *records[-_MAX_RECORDS + 1 :]]


def _cells(record: Any) -> list[str]:
    held_out, estimate = record.validation, record.log_partition
    return [
        f"{record.step:,}",
        f"{record.loss:.4f}",
        str(record.train),
        "" if held_out is None else str(held_out),
        f"{estimate.value:.4f} +- {estimate.std_error:.4f}",
        str(estimate.status),
    ]


def require_counts(**counts: int | None) -> None:
    """Check that counts are positive, where they are given.

    Raises:
        ValueError: If one is not.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
