"""A name for each objective put at the energy sites of a model.

Each function takes any Pyro model with an
:class:`~pyro_ebm.distributions.EnergyDistribution` at one or more sites, and the
settings of the objective. What it returns is a model for ``SVI`` under any ELBO. Cost,
exactness and errors are those of the objective, and a ``TypeError`` if the model cannot
be called.
"""

__all__ = [
    "amortized_sampler",
    "bounded_likelihood",
    "contrastive_divergence",
    "denoising_score_matching",
    "energy_discrepancy",
    "exact_maximum_likelihood",
    "flow_contrastive",
    "importance_sampled_likelihood",
    "noise_contrastive",
    "ranking_noise_contrastive",
    "score_matching",
    "sliced_score_matching",
    "tempered_maximum_likelihood",
]

from collections.abc import Callable
from typing import Any

from pyro_ebm.infer.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.denoising import DenoisingScoreMatching
from pyro_ebm.infer.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.exact_likelihood import ExactMaximumLikelihood
from pyro_ebm.infer.flow_contrastive import FlowContrastive
from pyro_ebm.infer.generator import AmortizedSampler
from pyro_ebm.infer.handler import ObjectiveModel
from pyro_ebm.infer.importance import BoundedLikelihood, ImportanceSampledLikelihood
from pyro_ebm.infer.noise_contrastive import NoiseContrastive
from pyro_ebm.infer.ranking import RankingNoiseContrastive
from pyro_ebm.infer.score_matching import ScoreMatching, SlicedScoreMatching
from pyro_ebm.infer.tempered import TemperedMaximumLikelihood


def amortized_sampler(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`AmortizedSampler`.

    Is ``ObjectiveModel(model, AmortizedSampler(**settings))``.

    Example:
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = amortized_sampler(
        ...     model, generator=torch.nn.Linear(2, 2), latent_shape=(2,)
        ... )
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, AmortizedSampler(**settings))


def bounded_likelihood(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`BoundedLikelihood`.

    Is ``ObjectiveModel(model, BoundedLikelihood(**settings))``.

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> q = pyro_ebm.EnergyModel(energy, base)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = bounded_likelihood(model, num_draws=500)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, BoundedLikelihood(**settings))


def contrastive_divergence(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`ContrastiveDivergence`.

    Is ``ObjectiveModel(model, ContrastiveDivergence(**settings))``.

    Example:
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = contrastive_divergence(model, num_steps=5)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, ContrastiveDivergence(**settings))


def denoising_score_matching(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`DenoisingScoreMatching`.

    Is ``ObjectiveModel(model, DenoisingScoreMatching(**settings))``.

    Example:
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = denoising_score_matching(model, noise_scale=0.3)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, DenoisingScoreMatching(**settings))


def energy_discrepancy(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`EnergyDiscrepancy`.

    Is ``ObjectiveModel(model, EnergyDiscrepancy(**settings))``.

    Example:
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = energy_discrepancy(model, num_copies=16)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, EnergyDiscrepancy(**settings))


def exact_maximum_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`ExactMaximumLikelihood`.

    Is ``ObjectiveModel(model, ExactMaximumLikelihood(**settings))``.

    Example:
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned, elbo = exact_maximum_likelihood(model), pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, ExactMaximumLikelihood(**settings))


def flow_contrastive(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`FlowContrastive`.

    Is ``ObjectiveModel(model, FlowContrastive(**settings))``.

    Example:
        >>> class Flow(torch.nn.Linear):
        ...     def forward(self):
        ...         return dist.Normal(self.bias, 1.5).to_event(1)
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = flow_contrastive(model, flow=Flow(1, 2))
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, FlowContrastive(**settings))


def importance_sampled_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`ImportanceSampledLikelihood`.

    Is ``ObjectiveModel(model, ImportanceSampledLikelihood(**settings))``.

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> q = pyro_ebm.EnergyModel(energy, base)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = importance_sampled_likelihood(model, num_draws=500)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, ImportanceSampledLikelihood(**settings))


def noise_contrastive(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`NoiseContrastive`.

    Is ``ObjectiveModel(model, NoiseContrastive(**settings))``.

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> q = pyro_ebm.EnergyModel(energy, base)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = noise_contrastive(model, num_noise=4)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, NoiseContrastive(**settings))


def ranking_noise_contrastive(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`RankingNoiseContrastive`.

    Is ``ObjectiveModel(model, RankingNoiseContrastive(**settings))``.

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> q = pyro_ebm.EnergyModel(energy, base)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = ranking_noise_contrastive(model, num_noise=15)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, RankingNoiseContrastive(**settings))


def score_matching(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`ScoreMatching`.

    Is ``ObjectiveModel(model, ScoreMatching(**settings))``.

    Example:
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned, elbo = score_matching(model), pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, ScoreMatching(**settings))


def sliced_score_matching(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`SlicedScoreMatching`.

    Is ``ObjectiveModel(model, SlicedScoreMatching(**settings))``.

    Example:
        >>> q = pyro_ebm.EnergyModel(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = sliced_score_matching(model, num_directions=2)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, SlicedScoreMatching(**settings))


def tempered_maximum_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Make a Pyro model learn its energies by :class:`TemperedMaximumLikelihood`.

    Is ``ObjectiveModel(model, TemperedMaximumLikelihood(**settings))``.

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> q = pyro_ebm.EnergyModel(energy, base)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
        >>> learned = tempered_maximum_likelihood(model, num_chains=64)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(learned, lambda x: None, pyro.optim.Adam({}), elbo)
        >>> loss = svi.step(torch.randn(100, 2) + 1)
        >>> (q.energy.loc > 0).all()
        tensor(True)
    """
    return ObjectiveModel(model, TemperedMaximumLikelihood(**settings))
