r"""The rules of the verdict on a fit.

A difference :math:`\Delta` of mean energies, with standard error :math:`s`, counts if

.. math::
    |\Delta| > 4 s \quad\text{and}\quad
    \frac{\Delta^2}{2\, \mathrm{Var} f} > 0.05                            \tag{1}

The second is, to leading order, the log-likelihood a point that a better scale of the
energy would gain, in nats: less than that is not worth an alarm. Where the energy
corrects a base that has been fitted to the same rows, it has to hold for the correction
too: the scale of the base is not what is learned, and rows that a base knows by heart
are no fault of it.
"""

__all__ = ["MIN_STEPS", "judge", "worse_than_base"]

import math
from collections.abc import Sequence

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.infer.fit.diagnosis import EnergyDifference, FitDiagnostics
from pyro_ebm.infer.fit.fit_record import FitRecord
from pyro_ebm.infer.likelihood import LogLikelihood
from pyro_ebm.partition import LogPartitionEstimate

#: Standard errors beyond which a difference is none by chance ...
NUM_ERRORS = 4.0
#: ... and the log-likelihood a point, in nats, below which it does not matter.
SMALL = 0.05
#: Nested R-hat of the energies of chains that hold still.
MAX_R_HAT = 1.05
#: Fewer effective noise points a step than this give no gradient worth having.
MIN_NOISE_ESS = 5.0
#: Steps over a finite support after which a model that has gained nothing has nothing
#: to gain.
MIN_STEPS = 1000
#: Data told from noise this often: hardly any pair teaches something.
MAX_SEPARATION = 0.995


def judge(
    found: FitDiagnostics,
    log_partition: LogPartitionEstimate,
    stopped: str,
    history: Sequence[FitRecord] = (),
    known: Sequence[Finding] = (),
    num_steps: int | None = None,
) -> tuple[Finding, ...]:
    """Apply all rules; return the findings, the gravest first.

    Args:
        found: From the end of the fit.
        log_partition: Of the averaged model.
        stopped: Why the fit ended.
        history: Of the fit.
        known: What is known against the estimator without looking at the fit.
        num_steps: Of a fit that began with independent sites, and may have been ended
            before it has learned more.
    """
    broken: list[Finding] = []
    if stopped == "loss not finite":
        nan = "the loss became nan or infinite; the model is that of the last record"
        broken.append(Finding(Reason.LOSS_NOT_FINITE, nan))
    broken += known
    broken += [Finding(Reason.NOISE_TOO_FAR, text) for text in _noise_faults(found)]
    broken += [
        Finding(Reason.NOT_AT_EQUILIBRIUM, text) for text in _equilibrium_faults(found)
    ]
    if not log_partition.is_reliable:
        broken.append(Finding(Reason.UNKNOWN_LOG_PARTITION, log_partition.reason))
    gain = found.gain
    if gain is not None and gain.value < -NUM_ERRORS / 2 * gain.std_error - SMALL:
        broken.append(worse_than_base(gain))
    broken += [Finding(Reason.STILL_LEARNING, text) for text in _progress(history)]
    is_short = num_steps is not None and num_steps < MIN_STEPS
    if is_short and gain is not None and gain.value < NUM_ERRORS / 2 * gain.std_error:
        nothing = (
            f"in {num_steps} steps the model has gained {gain.value:.3f} +- "
            f"{gain.std_error:.3f} nats a point on independent sites, which may be "
            f"chance: take at least {MIN_STEPS:,}"
        )
        broken.append(Finding(Reason.STILL_LEARNING, nothing))
    return tuple(broken)


def worse_than_base(gain: LogLikelihood) -> Finding:
    """What is said of a model that has gained less than nothing."""
    return Finding(
        Reason.WORSE_THAN_BASE,
        f"on held-out points the model is worse than its base by {-gain.value:.3f} "
        f"+- {gain.std_error:.3f} nats a point: take the base, or an energy that "
        "corrects it, such as NeuralEnergy. Where the base was fitted here, it is the "
        "distribution of the result",
    )


def _noise_faults(found: FitDiagnostics) -> list[str]:
    faults = []
    if found.noise_ess is not None and found.noise_ess < MIN_NOISE_ESS:
        faults.append(
            f"of the noise points of a step only {found.noise_ess:.1f} count: draw "
            "more, or fit the noise to the data"
        )
    separation = found.noise_separation
    if separation is not None and separation > MAX_SEPARATION:
        faults.append(
            f"data are told from noise in {separation:.1%} of pairs, so the comparison "
            "teaches next to nothing: fit the noise to the data"
        )
    return faults


def _equilibrium_faults(found: FitDiagnostics) -> list[str]:
    faults = []
    if _is_off(found.drift):
        faults.append(
            f"the mean energy of the chains moves by {found.drift} once the parameters "
            "hold still: lower the learning rate, or give the chains more moves a step"
        )
    elif found.r_hat is not None and found.r_hat > MAX_R_HAT:
        faults.append(
            f"nested R-hat of the chains' energies is {found.r_hat:.3f}, above "
            f"{MAX_R_HAT}: lower the learning rate, or give them more moves a step"
        )
    if found.crossings is not None and found.crossings < 1:
        faults.append(
            "in the last tenth of the steps a chain has gone from one side of the data "
            f"to the other {found.crossings:.2g} times, so that the weights of the "
            "sides are left to chance: take more steps, or more moves a step"
        )
    is_base = found.learned_gap is not None and not _is_off(found.learned_gap)
    if _is_off(found.energy_gap) and not is_base:
        faults.append(
            f"the energy of the data differs from that of the model by "
            f"{found.energy_gap}: go on with more steps, or end with "
            "MaximumLikelihood at a lower learning rate"
        )
    return faults


def _progress(history: Sequence[FitRecord]) -> list[str]:
    """What the likelihood has gained in the last quarter of the last stage."""
    if not history:
        return []
    records = [r for r in history if r.stage == history[-1].stage]
    if len(records) < 2:
        return []
    late, early = records[-1], records[-1 - max(len(records) // 4, 1)]
    held_out = late.validation is not None
    pair = [r.validation if held_out else r.train for r in (late, early)]
    new, old = (value for value in pair if value is not None)
    error = math.hypot(new.std_error_log_partition, old.std_error_log_partition)
    gain = new.value - old.value
    if not new.is_normalized or not old.is_normalized:
        return []
    if gain < max(NUM_ERRORS * error, SMALL):
        return []
    return [
        f"the {'held-out' if held_out else 'training'} log-likelihood still rose by "
        f"{gain:.3f} in the last {late.step - early.step:,} steps: go on with more"
    ]


def _is_off(difference: EnergyDifference | None) -> bool:
    return (
        difference is not None
        and abs(difference.value) > NUM_ERRORS * difference.std_error
        and abs(difference.relative) > math.sqrt(2 * SMALL)  # (1)
    )
