"""Label sequences by a conditional random field, a chain with potentials of a network.

A site with an exact chain learns by plain SVI: its loss is the forward algorithm's.
"""

# %%
import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ebm.energies import ChainEnergy

torch.set_num_threads(1)
LABELS, LENGTH = 5, 20


# %% Labels follow a Markov chain; a feature says only which pair of labels it may be.
def make_data(number):
    stay = 0.75 * torch.eye(LABELS) + 0.25 * torch.eye(LABELS).roll(1, 1)
    steps = stay / stay.sum(-1, keepdim=True)
    y = [torch.randint(LABELS, (number,))]
    for _ in range(LENGTH - 1):
        y.append(dist.Categorical(steps[y[-1]]).sample())
    y = torch.stack(y, -1)
    angle = 2 * torch.pi * y / LABELS
    side = 2 * torch.randint(2, y.shape) - 1  # no line parts the labels
    x = side[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    x = x + 0.5 * torch.randn_like(x)
    mask = torch.arange(LENGTH) < torch.randint(5, LENGTH + 1, (number, 1))
    return x, y.float().where(mask, 0.0), mask  # what is not there holds label 0


# %%
class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, LABELS))
        self.transition = nn.Parameter(torch.zeros(LABELS, LABELS))

    def forward(self, x, mask):
        chain = ChainEnergy(self.net(x), self.transition, mask)
        return chain.closed_form().distribution


def learn(field, x, y, mask, epochs):
    def model(x, y, mask):
        pyro.module("field", field)
        with pyro.plate("sequences", len(x)):
            pyro.sample("y", field(x, mask), obs=y)

    optim = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(model, lambda *_: None, optim, Trace_ELBO())
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x)).split(64):
            total += svi.step(x[rows], y[rows], mask[rows])
        print(f"epoch {epoch + 1}: {total / mask.sum():.4f} nats a token")


# %% The loss written out: log Z by the forward algorithm, less the score of the labels.
def forward_algorithm(field, x, y, mask):
    unary, y = field.net(x), y.long()
    message, score = unary[:, 0], unary[:, 0].gather(-1, y[:, :1])[:, 0]
    for t in range(1, LENGTH):
        ahead = (message[..., None] + field.transition).logsumexp(-2) + unary[:, t]
        message = torch.where(mask[:, t, None], ahead, message)
        step = field.transition[y[:, t - 1], y[:, t]]
        step = step + unary[:, t].gather(-1, y[:, t, None])[:, 0]
        score = score + step.where(mask[:, t], 0.0)
    return message.logsumexp(-1) - score


# %%
def main(number, epochs):
    pyro.set_rng_seed(0)
    field = Field()
    learn(field, *make_data(number), epochs)
    x, y, mask = make_data(1000)
    with torch.no_grad():
        chain = field(x, mask)
        alone = (field.net(x).argmax(-1) == y)[mask].float().mean()
        right = (chain.mode == y)[mask].float().mean()
        probs = chain.marginals()
    print(f"token accuracy {right:.3f}, by the network alone {alone:.3f}")
    # Marginals say how often they are right.
    top, guess = probs.max(-1)
    for low in (0.3, 0.5, 0.7, 0.9):
        bin_ = mask & (top >= low) & (top < low + 0.2)
        share = (guess == y)[bin_].float().mean()
        print(f"probability {top[bin_].mean():.2f}: right {share:.2f} of {bin_.sum()}")
    field, x = field.double(), x.double()
    loss = -field(x, mask).log_prob(y.double()).sum()
    expected = forward_algorithm(field, x, y, mask).sum()
    own = list(field.parameters())
    pairs = zip(
        torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True
    )
    apart = max((a - b).abs().max().item() for a, b in pairs)
    print(
        f"loss less the forward algorithm's {loss - expected:.1e}, gradient {apart:.1e}"
    )
    assert abs(loss - expected) < 1e-9 * loss
    assert apart < 1e-9 * loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    main(*((128, 1) if args.smoke_test else (2000, 8)))
