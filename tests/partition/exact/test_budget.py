"""Limits on evaluations, seconds and memory."""

import time

import pytest
import torch
from tqdm.auto import tqdm

from pyro_ebm.partition.exact import budget as module
from pyro_ebm.partition.exact.budget import Budget, OutOfBudgetError


def budget(max_evaluations=10**6, max_seconds=60.0, max_bytes=1e12):
    return Budget(max_evaluations, max_seconds, max_bytes, tqdm(disable=True))


def test_all_points_in_order():
    x = torch.arange(3000.0)
    sizes = []

    def function(part):
        sizes.append(len(part))
        return part, part**2

    first, second = budget().evaluate(function, x)
    assert torch.equal(first, x)
    assert torch.equal(second, x**2)
    assert sizes[0] == 64
    assert sizes[1] == 128


def test_no_point_at_all():
    (value,) = budget().evaluate(lambda part: (part.sum(-1),), torch.zeros(0, 2))
    assert value.shape == (0,)


def test_chunks_stay_small_where_memory_grows(monkeypatch):
    """Planted fault: memory not looked at; chunks of thousands."""
    held = [0.0]
    monkeypatch.setattr(module, "_peak_memory", lambda: held[0])
    sizes = []

    def function(part):
        sizes.append(len(part))
        held[0] = max(held[0], 1e6 * len(part))
        return (part,)

    budget(max_bytes=300e6).evaluate(function, torch.zeros(5000))
    assert max(sizes) == 256
    assert held[0] < 300e6


def test_limits_raise_before_they_are_passed():
    limited = budget(max_evaluations=100)
    limited.evaluate(lambda part: (part,), torch.zeros(60))
    with pytest.raises(OutOfBudgetError, match=r"100 evaluations \(max_evaluations\)"):
        limited.evaluate(lambda part: (part,), torch.zeros(60))
    assert limited.num_evaluations == 60
    timed = budget(max_seconds=0.02)

    def slow(part):
        end = time.process_time() + 0.005  # the time of others does not count
        while time.process_time() < end:
            pass
        return (part,)

    with pytest.raises(OutOfBudgetError, match=r"0.02 seconds \(max_seconds\)"):
        timed.evaluate(slow, torch.zeros(10**6))


def test_the_pace_is_that_of_the_best_chunk():
    """Planted fault: the mean pace, in which the first call pays for tracing."""
    limited, seconds = budget(max_seconds=10.0), [0.2, 0.0]

    def traced(part):
        end = time.process_time() + seconds.pop(0)
        while time.process_time() < end:
            pass
        return (part,)

    limited.evaluate(traced, torch.zeros(64 + 128))
    limited.require_time(100_000)  # 104 seconds at the mean pace
