"""Is f = exp(g) sharper, does it generalise worse? Beside g, -exp(-g) and memories.

The features of g are fixed and have mean 0, so that no constant b can be learned, with
which exp(b + h exp(-b)) would imitate h. The likelihood is exact, by quadrature.
"""

# %%
import argparse
from collections import defaultdict
from itertools import product

import matplotlib.pyplot as plt
import pyro
import torch
from torch import nn
from torch.func import grad, hessian, vmap

from pyro_ebm import datasets
from pyro_ebm.energies import FunctionEnergy, MixtureEnergy

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
SIZE, TARGETS = 128, ["eight_gaussians", "checkerboard"]
COLUMNS = "train test trimmed %>10 median KL slope bend peak".split()


# %% The box [-5, 5]^2: midpoints of its cells, and features that have mean 0 there.
def make_nodes(per_side):
    line = (torch.arange(per_side) + 0.5) * 10 / per_side - 5
    return torch.cartesian_prod(line, line)


def make_features():
    frequency, phase = 1.5 * torch.randn(2, SIZE), 2 * torch.pi * torch.rand(SIZE)
    mean = (make_nodes(160) @ frequency + phase).cos().mean(0)
    return lambda x: ((x @ frequency + phase).cos() - mean) * (2 / SIZE) ** 0.5


# %% Energies, as functions of the features. A memory has four g: an inner exponential.
def make_g():
    linear = nn.Linear(SIZE, 1, bias=False)
    return FunctionEnergy(nn.Sequential(linear, nn.Flatten(0)), (SIZE,))


FORMS = {
    "g": make_g,
    "exp(g)": lambda: make_g().exp(),
    "-exp(-g)": lambda: -(-make_g()).exp(),
    "-sum exp(-g)": lambda: -sum((-make_g()).exp() for _ in range(4)),
    "-log sum exp(-g)": lambda: MixtureEnergy([make_g() for _ in range(4)]),
}


# %% Maximum likelihood with a ridge, as minus a log-density. How good it is, how sharp.
def learn(f, phi, x, coarse, fine, ridge, steps):
    optim = torch.optim.LBFGS(f.parameters(), 1, steps, line_search_fn="strong_wolfe")

    def closure():
        optim.zero_grad()
        loss = f(x).mean() + torch.logsumexp(-f(coarse), 0)
        loss = loss + ridge / 2 * sum(p.square().sum() for p in f.parameters())
        loss.backward()
        return loss

    optim.step(closure)
    log_area = torch.tensor(100 / len(fine)).log()
    log_z = torch.logsumexp(log_area - f.requires_grad_(False)(fine), 0)
    return lambda x: f(phi(x)) + log_z


def judge(loss, log_p, nodes, train, test):
    on_nodes, on_test = loss(nodes), loss(test).sort().values
    kl = (log_p.softmax(0) * (log_p + on_nodes)).nansum()
    single = lambda x: loss(x[None])[0]  # noqa: E731
    slope = vmap(grad(single))(nodes).norm(dim=-1).max()
    bend = torch.linalg.eigvalsh(vmap(hessian(single))(train[:400]))[:, -1].median()
    trimmed, far = on_test[: -len(test) // 20], 100.0 * (on_test > 10)
    means = [part.mean() for part in (loss(train), on_test, trimmed, far)]
    return torch.stack([*means, on_test.median(), kl, slope, bend, -on_nodes.min()])


# %% The ridge is chosen on as many other points. Medians over seeds, and a picture.
def main(seed, output, sizes=(50, 400, 3000), num_seeds=3, steps=100):
    grid, nodes, table = make_nodes(48), make_nodes(160), defaultdict(list)
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    for target, n, k in product(TARGETS, sizes, range(num_seeds)):
        pyro.set_rng_seed(seed + k)
        truth, phi = getattr(datasets, f"{target}_density")(), make_features()
        train, validation, test = truth.sample((2 * n + 10_000,)).split([n, n, 10_000])
        at, log_p = [phi(x) for x in (train, grid, nodes)], truth.log_prob(nodes)
        losses = {target: lambda x, truth=truth: -truth.log_prob(x)}
        for form, make in FORMS.items():
            learned = [learn(make(), phi, *at, 0.1**p, steps) for p in range(1, 7)]
            losses[form] = min(learned, key=lambda loss: loss(validation).mean())
            table[target, n, form] += [judge(losses[form], log_p, nodes, train, test)]
        for name, loss in losses.items() if (n, k) == (sizes[-1], 0) else ():
            ax = figure.add_subplot(2, 6, len(figure.axes) + 1, title=name)
            image = loss(nodes).clamp(1, 12).cpu().view(160, 160).T
            ax.imshow(image, "viridis_r", origin="lower", vmin=1, vmax=12)
            ax.set_axis_off()
    figure.savefig(output, dpi=120)
    print(f"{f'medians of {num_seeds}':38}", *(f"{column:>8}" for column in COLUMNS))
    for (target, n, form), rows in table.items():
        medians = torch.stack(rows).median(0).values.tolist()
        print(f"{target:15} {n:5} {form:16}", *(f"{value:8.4g}" for value in medians))
    kl, ahead = table[target, n, "g"][-1][5], losses["g"](test) + truth.log_prob(test)
    print(f"KL of g: {kl:.4f}, on points {ahead.mean():.4f} +- {ahead.std() / 100:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda")
    parser.add_argument("--output", default="exponential.png", help="the picture")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    quick = {"sizes": (50,), "num_seeds": 1, "steps": 5} if options.smoke_test else {}
    main(options.seed, options.output, **quick)
