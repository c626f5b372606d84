"""Chains against sums over all of their states."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ebm.energies import ChainEnergy
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.partition import enumeration, estimate

STEPS = {"shared": (3, 3), "own": (3, 3, 3), "batch": (2, 3, 3, 3)}
LENGTHS = torch.tensor([4, 2])


def chains(steps="shared", scale=1.0, *, masked=False):
    """Two chains of four sites with three states."""
    mask = torch.arange(4) < LENGTHS[:, None] if masked else None
    unary, transition = torch.randn(2, 4, 3), torch.randn(STEPS[steps])
    return ChainEnergy(scale * unary, scale * transition, mask)


def states(energy):
    """All states, with an axis for the batch, and their log densities ``(N, B)``."""
    number = torch.arange(num_points(energy.support, energy.event_shape))
    x = finite_points(energy.support, energy.event_shape, number, energy.values)
    x = x[:, None].expand(-1, *energy.batch_shape, -1)
    return x, -energy(x)


def one_hot(x):
    return nn.functional.one_hot(x.long(), 3).to(x)


@pytest.fixture(params=[(s, m) for s in STEPS for m in (False, True)], ids=str)
def energy(request):
    return chains(request.param[0], masked=request.param[1])


def test_energy_is_the_sum_of_its_terms():
    energy = chains("own")
    x = torch.tensor([[0.0, 2, 1, 1], [2, 2, 0, 1]])
    for row, unary, value in zip(x.long(), energy.unary, energy(x), strict=True):
        sites = sum(unary[t, row[t]] for t in range(4))
        steps = sum(energy.transition[t, row[t], row[t + 1]] for t in range(3))
        torch.testing.assert_close(value, -sites - steps)
    assert (energy(x + 0.5) == math.inf).all()
    assert (energy(x - 1) == math.inf).tolist() == [True, True]
    assert energy(x * math.nan).isnan().all()


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["products", "log-sums"])
def test_log_partition_and_gradient(energy, scale):
    """Planted fault: messages from the right without the potential of their site."""
    with torch.no_grad():
        energy.unary *= scale
    _, log_terms = states(energy)
    expected = log_terms.logsumexp(0)
    found = energy.closed_form().log_partition
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, -0.7])
    own = list(energy.parameters())
    for a, b in zip(
        torch.autograd.grad(weights @ found, own),
        torch.autograd.grad(weights @ expected, own),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_long_chain_is_the_loop():
    """Value and gradient where messages are rescaled many times."""
    unary = (3 * torch.randn(5, 300, 4)).requires_grad_()
    transition = (2 * torch.randn(4, 4)).requires_grad_()
    message = unary[:, 0]
    for t in range(1, 300):
        message = (message[..., None] + transition).logsumexp(-2) + unary[:, t]
    found = ChainEnergy(unary, transition).closed_form().log_partition
    expected = message.logsumexp(-1)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    for a, b in zip(
        torch.autograd.grad(found.sum(), (unary, transition)),
        torch.autograd.grad(expected.sum(), (unary, transition)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "forbid"), [(1.0, False), (10.0, True)])
def test_long_chain_in_single_precision(scale, forbid):
    """Planted fault: log messages that grow along the chain, and lose their digits."""
    unary, transition = (scale * torch.randn(n, 4).float() for n in (1500, 4))
    if forbid:
        transition[0, 3] = -torch.inf
    exact, single = (
        ChainEnergy(unary.to(dtype), transition.to(dtype)).closed_form().distribution
        for dtype in (torch.float64, torch.float32)
    )
    one = torch.ones(1500).float()
    with torch.no_grad():
        expected = exact.marginals().float()
    found = single.log_partition
    assert found.item() == pytest.approx(exact.log_partition.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(found, single.energy.unary)
    with torch.no_grad():
        plain = single.marginals()
    for probs in (single.marginals(), plain, grad):
        torch.testing.assert_close(probs.sum(-1), one, rtol=0, atol=1e-5)
        torch.testing.assert_close(probs, expected, rtol=0, atol=1e-5)


def test_second_derivative(energy):
    def log_partition(unary, transition):
        inner = ChainEnergy(unary, transition, energy.mask)
        return inner.closed_form().log_partition

    inputs = [p.detach().clone().requires_grad_() for p in energy.parameters()]
    assert torch.autograd.gradgradcheck(log_partition, inputs)


def test_extreme_and_forbidden():
    """No path but one: no nan, though products of single numbers would underflow."""
    unary = torch.tensor([[1e3, -1e3], [-1e3, 1e3], [1e3, -torch.inf]])
    transition = torch.tensor([[-torch.inf, -1e3], [1e3, -torch.inf]])
    energy = ChainEnergy(unary, transition)
    known = energy.closed_form()
    (grad,) = torch.autograd.grad(known.log_partition, energy.unary)
    assert known.log_partition.item() == pytest.approx(3e3)
    expected = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    torch.testing.assert_close(grad, expected)
    marginals = known.distribution.marginals()
    torch.testing.assert_close(marginals, expected)
    (grad,) = torch.autograd.grad(marginals[0, 0], energy.transition)
    assert grad.eq(0).all()
    assert known.distribution.sample((50,)).eq(torch.tensor([0.0, 1, 0])).all()
    assert known.distribution.mode.tolist() == [0, 1, 0]
    nothing = ChainEnergy(torch.zeros(2, 2), torch.full((2, 2), -torch.inf))
    assert nothing.closed_form().log_partition == -torch.inf
    assert nothing(torch.zeros(2)) == torch.inf


def test_marginals_and_mode(energy):
    x, log_terms = states(energy)
    exact = energy.closed_form().distribution
    expected = torch.einsum("nb,nbtk->btk", log_terms.softmax(0), one_hot(x))
    torch.testing.assert_close(exact.marginals(), expected)
    with torch.no_grad():  # where views of a parameter are leaves
        found = energy.closed_form().distribution.marginals()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(exact.mean, expected @ torch.arange(3.0))
    best = torch.stack([x[i, b] for b, i in enumerate(log_terms.argmax(0))])
    torch.testing.assert_close(exact.mode, best)
    torch.testing.assert_close(exact.log_prob(x), log_terms.log_softmax(0))


def chi_square(draws, log_terms):
    """|z| of Pearson's statistic of draws by number, against logits."""
    expected = len(draws) * log_terms.softmax(0)
    kept = expected > 5
    count = torch.bincount(draws, minlength=len(expected)).to(expected)
    rest = (count[~kept].sum() - expected[~kept].sum()) ** 2
    rest = rest / expected[~kept].sum().clamp(min=1e-9)
    statistic = ((count - expected) ** 2 / expected)[kept].sum() + rest
    dof = kept.sum() - 1 + (~kept).any()
    return ((statistic - dof) / (2 * dof).sqrt()).abs()


def test_draws(energy):
    """Planted fault: the step transposed on the way back."""
    _, log_terms = states(energy)
    draws = energy.closed_form().distribution.sample((20_000,))
    number = (draws * 3 ** torch.arange(4)).sum(-1).long()
    for b in range(2):
        assert chi_square(number[:, b], log_terms[:, b].detach()) < 4


def test_site_logits_are_differences_of_energies(energy):
    x = energy.closed_form().distribution.sample((5,))
    logits = energy.site_logits(x)
    for site in range(4):
        changed = x.expand(3, *x.shape).clone()
        changed[..., site] = torch.arange(3.0)[:, None, None]
        expected = (-energy(changed)).log_softmax(0)
        torch.testing.assert_close(logits[..., site].log_softmax(0), expected)


def test_condition(energy):
    x, log_terms = states(energy)
    exact = energy.closed_form().distribution
    given = exact.condition({1: torch.tensor([2.0, 1.0])})
    assert given.event_shape == (3,)
    for b, value in enumerate((2, 1)):
        inside = x[:, b, 1] == value
        log_part = log_terms[inside, b]
        torch.testing.assert_close(given.log_partition[b], log_part.logsumexp(0))
        rest = x[inside, b][:, [0, 2, 3]]
        found = given.log_prob(rest[:, None].expand(-1, 2, -1))[:, b]
        torch.testing.assert_close(found, log_part.log_softmax(0))
        expected = torch.einsum("n,ntk->tk", log_part.softmax(0), one_hot(rest))
        torch.testing.assert_close(given.marginals()[b], expected)
    draws = given.sample((7,))
    assert draws.shape == (7, 2, 3)
    assert given.support.check(draws).all()
    torch.testing.assert_close(
        given.condition({0: 0.0}).log_partition,
        exact.condition({0: 0.0, 1: torch.tensor([2.0, 1.0])}).log_partition,
    )


def test_one_site_and_one_state():
    energy = ChainEnergy(torch.tensor([[1.0, 2.0]]), torch.zeros(2, 2))
    expected = math.log(math.e + math.e**2)
    assert energy.closed_form().log_partition.item() == pytest.approx(expected)
    assert enumeration(energy).value == pytest.approx(expected)
    exact = energy.closed_form().distribution
    torch.testing.assert_close(exact.marginals(), energy.unary.softmax(-1))
    (grad,) = torch.autograd.grad(exact.mean.sum(), energy.unary)
    share = math.e / (1 + math.e) ** 2
    torch.testing.assert_close(grad, torch.tensor([[-share, share]]))
    assert exact.sample().shape == (1,)
    steps = ChainEnergy(torch.zeros(1, 2), torch.zeros(0, 2, 2))
    log_partition = steps.closed_form().log_partition
    parts = torch.autograd.grad(log_partition, [*steps.parameters()], create_graph=True)
    assert parts[1].shape == (0, 2, 2)
    single = ChainEnergy(torch.ones(3, 1), torch.zeros(1, 1))
    assert single.closed_form().log_partition.item() == pytest.approx(3)


def test_estimate_is_exact():
    energy = ChainEnergy(torch.randn(40, 3), torch.randn(3, 3))
    found = estimate(energy)
    assert found.status == "exact"
    assert found.value == pytest.approx(energy.closed_form().log_partition.item())


def test_a_random_field_learns_by_plain_svi():
    """The loss is that of the forward algorithm, and so is its gradient."""
    net, transition = nn.Linear(2, 3), nn.Parameter(torch.randn(3, 3))
    context, labels = torch.randn(6, 4, 2), torch.randint(3, (6, 4)).double()

    def model():
        pyro.module("net", net)
        chain = ChainEnergy(net(context), transition)
        with pyro.plate("sequences", 6):
            pyro.sample("y", chain.closed_form().distribution, obs=labels)

    loss = Trace_ELBO().differentiable_loss(model, lambda: None)
    unary, index = net(context), labels.long()
    message = unary[:, 0]
    for t in range(1, 4):
        message = (message[..., None] + transition).logsumexp(-2) + unary[:, t]
    score = unary.gather(-1, index[..., None]).sum()
    score = score + transition[index[:, :-1], index[:, 1:]].sum()
    expected = message.logsumexp(-1).sum() - score
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    own = [*net.parameters(), transition]
    for a, b in zip(
        torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < losses[0] - 5


def test_latent_potentials_stay_live():
    loc = torch.zeros(3, requires_grad=True)
    energy = ChainEnergy(loc.expand(4, 3), torch.eye(3))
    assert [name for name, _ in energy.named_parameters()] == ["transition"]
    exact = energy.closed_form().distribution
    (grad,) = torch.autograd.grad(exact.log_prob(torch.zeros(4)), loc)
    torch.testing.assert_close(grad.sum(), torch.tensor(0.0))
    assert grad[0] > 1


def test_batch_can_be_expanded_in_front_only():
    exact = chains().closed_form().distribution
    more = exact.expand((5, 2))
    assert more.sample((3,)).shape == (3, 5, 2, 4)
    assert more.log_prob(more.sample()).shape == more.log_partition.shape == (5, 2)
    with pytest.raises(NotImplementedError, match=r"must end in \(2,\)"):
        exact.expand((6,))
    one = ChainEnergy(torch.randn(4, 3), torch.randn(3, 3)).closed_form().distribution
    x = one.expand((6,)).sample()
    assert x.unique(dim=0).shape[0] > 1


def test_wrong_arguments():
    unary, steps = torch.zeros(2, 4, 3), torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"unary must have shape .*got \(3,\)"):
        ChainEnergy(torch.zeros(3), steps)
    with pytest.raises(ValueError, match=r"transition must .*\(2, 3, 3, 3\)"):
        ChainEnergy(unary, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"transition must hold no nan and no \+inf"):
        ChainEnergy(unary, steps + torch.inf)
    with pytest.raises(ValueError, match="mask must hold booleans"):
        ChainEnergy(unary, steps, torch.ones(2, 4))
    gap = torch.tensor([True, False, True, True])
    with pytest.raises(ValueError, match="mask must be true up to the length"):
        ChainEnergy(unary, steps, gap)
    exact = ChainEnergy(unary, steps).closed_form().distribution
    with pytest.raises(ValueError, match="observed value of site 0 must be one of"):
        exact.condition({0: 3.0})
    with pytest.raises(ValueError, match="observed must name sites"):
        exact.condition({4: 0.0})
    with pytest.raises(ValueError, match="observed holds all sites"):
        exact.condition(dict.fromkeys(range(4), 0.0))


def test_arrays_integers_and_lists():
    numpy = pytest.importorskip("numpy")
    unary, mask = [[0, 1], [2, 0], [1, 1]], [True, True, False]
    expected = ChainEnergy(torch.tensor(unary).double(), torch.eye(2), mask)
    for convert in (torch.tensor, numpy.array, list):
        energy = ChainEnergy(convert(unary), torch.eye(2).long(), mask)
        assert energy.transition.dtype == torch.float64
        torch.testing.assert_close(
            energy.closed_form().log_partition, expected.closed_form().log_partition
        )
    for wrong in ("text", [[1, 2], [3]], torch.zeros(3, 2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="unary must be a tensor or an array of re"):
            ChainEnergy(wrong, torch.eye(2))
    exact = energy.closed_form().distribution
    with pytest.raises(
        ValueError, match=r"site 0 must be a number .* got shape \(2,\)"
    ):
        exact.condition({0: torch.tensor([0.0, 1.0])})


def test_enumerate_support():
    exact = ChainEnergy(torch.randn(4, 3), torch.randn(3, 3)).closed_form().distribution
    x = exact.expand((5,)).enumerate_support(expand=False)
    assert x.shape == (81, 1, 4)
    torch.testing.assert_close(exact.log_prob(x[:, 0]).exp().sum(), torch.tensor(1.0))
    long = ChainEnergy(torch.zeros(40, 3), torch.eye(3)).closed_form().distribution
    assert not long.has_enumerate_support
    with pytest.raises(NotImplementedError, match="at most 4,096 states"):
        long.enumerate_support()
    assert isinstance(long, dist.TorchDistribution)
