"""One record of the history of a fit."""

__all__ = ["FitRecord"]

from typing import NamedTuple

from pyro_ebm.infer.fit.diagnosis import EnergyDifference
from pyro_ebm.infer.likelihood import LogLikelihood
from pyro_ebm.partition import LogPartitionEstimate


class FitRecord(NamedTuple):
    r"""One record of the history; all but the loss belong to the averaged parameters.

    Attributes:
        step: Parameter steps so far.
        loss: Negative log-likelihood a point of the last batch at the iterate, in nats.
        train: Mean log-likelihood of training points, with error.
        validation: That of the validation points, or ``None``.
        log_partition: :math:`\log Z` with its verdict.
        stage: Which stage the step belongs to, from 0.
        energy_gap: Mean energy of training points less that of the model, or ``None``
            while log Z is unknown.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> model, data = pyro_ebm.EnergyModel(energy), torch.randn(50, 2)
        >>> settings = {"num_steps": 4, "record_interval": 2, "progress_bar": False}
        >>> result = pyro_ebm.fit(model, data, **settings)
        >>> [record.step for record in result.history]
        [0, 2, 4]
    """

    step: int
    loss: float
    train: LogLikelihood
    validation: LogLikelihood | None
    log_partition: LogPartitionEstimate
    stage: int = 0
    energy_gap: EnergyDifference | None = None
