"""What a run keeps of its chains, and goes on from."""

import torch

from pyro_ebm.mcmc.base import StepInfo
from pyro_ebm.mcmc.run.driver import Tally


def step(count):
    every = torch.ones(3)
    for _ in range(count):
        yield StepInfo(0.5 * every, every > 0, every > 0)


def test_a_saved_tally_is_a_copy():
    """The sums of a state that was saved were those of the run that went on."""
    tally = Tally(3, torch.device("cpu"))
    for info in step(4):
        tally.add(info)
    saved = tally.state_dict()
    for info in step(6):
        tally.add(info)
    resumed = Tally(3, torch.device("cpu"))
    resumed.load_state_dict(saved)
    for info in step(2):
        resumed.add(info)
    assert saved["num_transitions"] == 4
    assert torch.equal(saved["accept_prob"], torch.full((3,), 2.0))
    assert resumed.num_transitions == 6
    assert torch.equal(resumed.accept_prob, torch.full((3,), 3.0))
