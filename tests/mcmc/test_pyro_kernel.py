"""Kernels inside ``pyro.infer.MCMC``, against conjugate answers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from pyro.ops.stats import effective_sample_size

import pyro_ebm
from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.diagnostics import mean_std_error
from pyro_ebm.energies import QuadraticEnergy
from pyro_ebm.mcmc import HMC, MALA, PyroKernel
from pyro_ebm.mcmc.base import accept
from pyro_ebm.mcmc.kernels import hmc, langevin

KERNELS = {"mala": MALA(), "hmc": HMC(num_leapfrog=2)}
DATA = torch.tensor([1.2, 0.4, 2.1, 1.7, 0.9], dtype=torch.float64)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def normal_model(data):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(loc, 0.5), obs=data)


def gamma_model(data):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Exponential(rate), obs=data)


def run(kernel, model, *args, num_samples=1500, warmup_steps=300, **kwargs):
    mcmc = MCMC(
        PyroKernel(kernel, model),
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        disable_progbar=True,
        **kwargs,
    )
    mcmc.run(*args)
    return mcmc


def assert_chain_moments(draws, mean, variance):
    """First and second moments of one correlated chain, ``|z| < 4``."""
    for value, truth in [(draws, mean), ((draws - mean) ** 2, variance)]:
        ess = effective_sample_size(value[None]).item()
        assert ess > 50
        z = (value.mean() - truth) / (value.std() / ess**0.5)
        assert abs(z) < 4


def test_conjugate_normal(kernel):
    """First and second moments; planted faults below."""
    draws = run(kernel, normal_model, DATA).get_samples()["loc"]
    precision = 1 / 4 + len(DATA) / 0.25
    mean = (DATA.sum() / 0.25 / precision).item()
    assert_chain_moments(draws, mean, 1 / precision)


def test_conjugate_gamma_on_a_constrained_site(kernel):
    """First and second moments; planted faults below."""
    draws = run(kernel, gamma_model, DATA, num_samples=700).get_samples()["rate"]
    concentration, rate = 2.0 + len(DATA), 1.0 + DATA.sum().item()
    assert (draws > 0).all()
    assert_chain_moments(draws, concentration / rate, concentration / rate**2)


def test_agrees_with_nuts_and_with_many_chains():
    """Pyro's NUTS, a kernel of ours in its place, and 256 chains of that kernel.

    First and second moments of each pair, ``|z| < 4``; planted fault below.
    """
    center = (2 + len(DATA)) / (1 + DATA.sum())
    nuts = MCMC(NUTS(gamma_model), 500, 150, disable_progbar=True)
    nuts.run(DATA)
    many = pyro_ebm.mcmc.MCMC(KERNELS["hmc"], 50, 100, 256, progress_bar=False)
    many.run(gamma_model, DATA)
    ours = run(KERNELS["hmc"], gamma_model, DATA, num_samples=500)
    draws = [
        nuts.get_samples(group_by_chain=True)["rate"],
        ours.get_samples(group_by_chain=True)["rate"],
        many.get_samples(group_by_chain=True)["rate"],
    ]
    for power in (1, 2):
        values = [(draw - center) ** power for draw in draws]
        means = torch.stack([value.mean() for value in values])
        errors = torch.stack([mean_std_error(value) for value in values])
        z = (means - means[:, None]) / (errors**2 + errors[:, None] ** 2).sqrt()
        assert z.abs().max() < 4


def no_jacobian(monkeypatch):
    monkeypatch.setattr(
        "torch.distributions.transforms.ExpTransform.log_abs_det_jacobian",
        lambda self, x, y: torch.zeros_like(x),
    )


def energies_alone(monkeypatch):
    """Acceptance without the proposal densities, or the kinetic energy."""

    def faulty(log_ratio, old, new):
        return accept(old.energy - new.energy, old, new)

    monkeypatch.setattr(langevin, "accept", faulty)
    monkeypatch.setattr(hmc, "accept", faulty)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (energies_alone, test_conjugate_normal),
        (no_jacobian, test_conjugate_gamma_on_a_constrained_site),
    ],
)
def test_planted_faults_are_caught(plant, check, kernel, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(kernel)


@pytest.mark.slow
def test_disagreement_with_nuts_is_caught(monkeypatch):
    """The difference of the energies counted twice."""

    def faulty(log_ratio, old, new):
        return accept(log_ratio + old.energy - new.energy, old, new)

    monkeypatch.setattr(hmc, "accept", faulty)
    with pytest.raises(AssertionError):
        test_agrees_with_nuts_and_with_many_chains()


def many_sites():
    pyro.sample("z_matrix", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    scalar = pyro.sample("a_scalar", dist.Normal(3.0, 1.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("plate", 4):
        pyro.sample("positive", dist.LogNormal(scalar, 0.1))


def test_sites_of_different_shapes(kernel):
    mcmc = run(kernel, many_sites, num_samples=30, warmup_steps=60)
    shapes = {name: value.shape for name, value in mcmc.get_samples().items()}
    assert shapes == {
        "z_matrix": (30, 2, 3),
        "a_scalar": (30,),
        "simplex": (30, 3),
        "positive": (30, 4),
    }
    samples = mcmc.get_samples()
    assert (samples["positive"] > 0).all()
    torch.testing.assert_close(samples["simplex"].sum(-1), torch.ones(30))
    # Each site got its own coordinates back.
    error = samples["positive"].log() - samples["a_scalar"][:, None]
    assert error.abs().max() < 0.5


def test_diagnostics_are_those_after_warmup(kernel):
    mcmc = run(kernel, normal_model, DATA, num_samples=300)
    diagnostics = mcmc.diagnostics()
    rate = diagnostics["acceptance rate"]["chain 0"]
    assert abs(rate - kernel.target_accept_prob) < 0.15
    assert diagnostics["non-finite proposals"]["chain 0"] == 0
    assert diagnostics["loc"]["r_hat"] < 1.1
    assert mcmc.kernel.logging()["acc. prob"] == f"{rate:.3f}"


def test_nonfinite_proposals_are_counted(kernel):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 0, 0.0, torch.nan))

    with pyro.validation_enabled(False):
        mcmc = run(kernel, model, num_samples=200, initial_params={"x": torch.ones(())})
    assert (mcmc.get_samples()["x"] > 0).all()
    assert mcmc.diagnostics()["non-finite proposals"]["chain 0"] > 0


def test_initial_params_are_used_once(kernel, monkeypatch):
    """They start the next run, and not the one after it, as with Pyro's kernels."""
    starts = []
    init = type(kernel).init

    def record(self, energy, x):
        starts.append(x.item())
        return init(self, energy, x)

    monkeypatch.setattr(type(kernel), "init", record)
    pyro_kernel = PyroKernel(kernel, normal_model)
    for initial_params in ({"loc": torch.tensor(7.0)}, None):
        settings = {"warmup_steps": 0, "initial_params": initial_params}
        MCMC(pyro_kernel, 2, disable_progbar=True, **settings).run(DATA)
    # The energy is evaluated anew at no point but the start.
    assert starts[0] == 7.0
    assert len(starts) == 2
    assert starts[1] != 7.0


@pytest.mark.filterwarnings("ignore:num_chains=2 is more than available_cpu")
@pytest.mark.parametrize("context", ["fork", "spawn", None])
def test_several_chains_as_with_pyros_kernels(context, monkeypatch):
    """A process a chain or one after the other, from starting points of their own."""
    num_cores = 1 if context is None else 3
    monkeypatch.setattr("torch.multiprocessing.cpu_count", lambda: num_cores)
    starts = {"rate": torch.tensor([-3.0, 3.0])}
    settings = {"num_chains": 2, "mp_context": context, "initial_params": starts}
    size = 5 if context == "spawn" else 400
    settings["warmup_steps"] = 5 if context == "spawn" else 300
    mcmc = run(HMC(num_leapfrog=2), gamma_model, DATA, num_samples=size, **settings)
    draws = mcmc.get_samples(group_by_chain=True)["rate"]
    assert draws.shape == (2, size)
    assert not torch.equal(draws[0], draws[1])
    assert (draws > 0).all()
    assert set(mcmc.diagnostics()["acceptance rate"]) == {"chain 0", "chain 1"}
    if context != "spawn":
        shape, rate = 2.0 + len(DATA), 1.0 + DATA.sum().item()
        assert_chain_moments(draws[1], shape / rate, shape / rate**2)


def log_gamma(params):
    """Minus the log density of the logarithm of a Gamma(3, 2), in two coordinates."""
    u = params["u"]
    return (2 * u.exp() - 3 * u).sum() + (params["v"] ** 2).sum() / 2


def test_a_potential_and_its_transforms():
    """Planted: the Jacobian added once more; transforms left out."""
    starts = {"u": torch.zeros(2), "v": torch.zeros(())}
    transforms = {"u": torch.distributions.transforms.ExpTransform().inv}
    kernel = PyroKernel(HMC(num_leapfrog=2), None, log_gamma, transforms=transforms)
    mcmc = MCMC(kernel, 700, 300, initial_params=starts, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()
    assert_chain_moments(samples["u"][:, 0], 1.5, 0.75)
    assert_chain_moments(samples["v"], 0.0, 1.0)
    bare = PyroKernel(HMC(), potential_fn=log_gamma)
    with pytest.raises(
        ValueError, match="initial_params must be given with a potential"
    ):
        MCMC(bare, 2, 2, disable_progbar=True).run()


def test_init_strategy(monkeypatch):
    found = []
    init = MALA.init

    def record(self, energy, x):
        found.append(x.item())
        return init(self, energy, x)

    monkeypatch.setattr(MALA, "init", record)
    strategy = init_to_value(values={"rate": torch.tensor(5.0)})
    kernel = PyroKernel(MALA(), gamma_model, init_strategy=strategy)
    MCMC(kernel, 2, 0, disable_progbar=True).run(DATA)
    assert found[0] == pytest.approx(torch.tensor(5.0).log().item())


def test_same_seed_same_chain(kernel):
    chains = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        mcmc = run(kernel, normal_model, DATA, num_samples=20, warmup_steps=20)
        chains.append(mcmc.get_samples())
    assert torch.equal(chains[0]["loc"], chains[1]["loc"])


def test_bad_models(kernel):
    with pytest.raises(TypeError, match=r"model must be a Pyro model.*EnergyDistrib"):
        PyroKernel(kernel, QuadraticEnergy(torch.zeros(2)))
    with pytest.raises(TypeError, match="got int"):
        PyroKernel(kernel, 3)
    with pytest.raises(TypeError, match="potential_fn must map a dict .* got int"):
        PyroKernel(kernel, potential_fn=3)
    with pytest.raises(ValueError, match="exactly one of model and .* got neither"):
        PyroKernel(kernel)
    with pytest.raises(ValueError, match="exactly one of model and .* got both"):
        PyroKernel(kernel, normal_model, log_gamma)
    with pytest.raises(ValueError, match="at least one continuous latent site"):
        run(kernel, lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=DATA[0]))


def test_start_of_infinite_energy(kernel):
    with pytest.raises(DivergenceError, match="1 chains"):
        run(kernel, normal_model, DATA, initial_params={"loc": torch.tensor(torch.inf)})
