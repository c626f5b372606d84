"""Mixed supports: what is in them, how they are split, and the way to real space."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core.spaces import MixedSupport, of_columns, states_of
from pyro_ebm.energies import FunctionEnergy, spins, unconstrained
from pyro_ebm.energies.discrete.finite import num_states
from pyro_ebm.energies.views.unconstrained import is_finite_support, same_support

C = dist.constraints
PARTS = [C.real, C.integer_interval(0, 2), C.positive, C.boolean]
LENGTHS = [2, 1, 1, 1]
INSIDE = torch.tensor([0.3, -2.0, 2.0, 0.5, 1.0])


def mixed():
    return of_columns(C.cat(PARTS, dim=-1, lengths=LENGTHS), (5,))


def test_both_spellings_are_one_support():
    wrapped = [C.independent(part, 1) for part in PARTS]
    spellings = [
        C.cat(wrapped, dim=-1, lengths=LENGTHS),
        C.independent(C.cat(PARTS, dim=-1, lengths=LENGTHS), 1),
    ]
    for support in spellings:
        energy = FunctionEnergy(lambda x: x.sum(-1), (5,), support)
        assert isinstance(energy.support, MixedSupport)
        assert same_support(energy.support, mixed())
    # torch's own check takes rows for columns, which is why there is another.
    rows = INSIDE.repeat(3, 1)
    assert spellings[0].check(rows).shape != (3,)
    assert mixed().check(rows).shape == (3,)


def test_it_is_split_into_a_real_and_a_finite_part():
    support = mixed()
    assert (support.real, support.finite) == ((0, 1, 3), (2, 4))
    assert support.real_support.check(INSIDE[[0, 1, 3]])
    assert not support.real_support.check(-INSIDE[[0, 1, 3]])
    assert num_states(support.finite_support, (2,)).tolist() == [3, 2]
    assert is_finite_support(support.finite_support)
    assert not is_finite_support(support)
    assert isinstance(support.at([0, 4]), MixedSupport)


@pytest.mark.parametrize(
    ("column", "value"),
    [(2, 0.5), (2, 3.0), (2, -1.0), (3, -0.1), (4, 2.0), (0, "nan")],
)
def test_points_outside_are_told(column, value):
    x = INSIDE.repeat(2, 1)
    x[1, column] = float(value)
    assert mixed().check(x).tolist() == [True, False]
    assert mixed().check_columns(x)[1].logical_not().nonzero().tolist() == [[column]]


def test_chains_move_where_real_columns_are_free():
    def cost(x):
        return x[..., 3] + x[..., 2]

    support = mixed()
    energy = FunctionEnergy(cost, (5,), support)
    flat, to_support = unconstrained(energy)
    u = torch.tensor([0.3, -2.0, 2.0, -0.7, 1.0])
    x = to_support(u)
    assert torch.equal(x[[0, 1, 2, 4]], u[[0, 1, 2, 4]])
    assert torch.allclose(to_support.inv(x), u)
    assert torch.allclose(flat(u), cost(x) - u[3])  # log det of exp
    assert not flat.support.check(to_support(u)[[0, 1, 2, 2, 1]])
    assert unconstrained(flat)[0] is flat


def test_columns_of_few_states_alone_are_a_finite_support():
    support = C.cat([C.boolean, C.integer_interval(0, 3)], dim=-1, lengths=[2, 1])
    energy = FunctionEnergy(lambda x: x.sum(-1), (3,), support)
    assert is_finite_support(energy.support)
    assert num_states(energy.support, (3,)).tolist() == [2, 2, 4]
    signs = MixedSupport([C.real, spins])
    assert states_of(spins).tolist() == [-1, 1]
    assert signs.check(torch.tensor([0.0, -1.0]))
    assert not signs.check(torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ([C.real, C.real], "both kinds"),
        ([C.real, C.nonnegative_integer], "finitely many"),
        ([C.simplex, C.boolean], "number on an interval"),
        ([C.real, C.boolean, spins], "Number the states"),
        ([C.real, C.boolean, C.integer_interval(1, 3)], "Number the states"),
    ],
)
def test_what_does_not_fit_is_refused(columns, match):
    with pytest.raises(ValueError, match=match):
        MixedSupport(columns)


def test_another_number_of_columns_is_refused():
    with pytest.raises(ValueError, match="lengths"):
        of_columns(C.cat(PARTS, dim=-1, lengths=LENGTHS), (4,))
