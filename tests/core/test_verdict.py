"""One verdict for every result: a status, and findings with a reason."""

import copy
import json
import pickle

import pytest
import torch

import pyro_ebm
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.core.verdict import in_words, sentence, status_of
from pyro_ebm.infer import FitResult
from pyro_ebm.infer.uncertainty.standard_errors import ParameterErrors
from pyro_ebm.mcmc.report.results import Diagnostics
from pyro_ebm.mcmc.tempering.tempered_draws import TemperedDraws
from pyro_ebm.partition import LogPartitionEstimate, LogRatioEstimate

STUCK = Finding(Reason.STUCK, "2 of 4 chains are stuck")
MIXED = Finding(Reason.NOT_MIXED, "R-hat is 1.2")


@pytest.mark.parametrize("word", [*Status, *Reason])
def test_a_word_is_the_string_that_it_prints_as(word):
    """In all the ways in which a user may print it, compare it or store it."""
    text = word.value
    assert word == text
    assert str(word) == f"{word}" == f"{word:s}" == "".join([word]) == text
    assert repr(word) == repr(text)
    assert json.loads(json.dumps({"word": word})) == {"word": text}
    assert {word: 1}[text] == 1
    for again in (copy.deepcopy(word), pickle.loads(pickle.dumps(word))):
        assert again is word is type(word)(text)


def test_no_two_rules_are_called_the_same():
    assert len({reason.value for reason in Reason}) == len(Reason.__members__)
    assert len(Status.__members__) == 4


def test_what_is_reliable():
    reliable = [status for status in Status if status.is_reliable]
    assert reliable == [Status.EXACT, Status.OK]


def test_the_status_follows_from_the_findings():
    assert status_of(()) is Status.OK
    assert status_of((), Status.EXACT) is Status.EXACT
    assert status_of([STUCK], Status.EXACT) is Status.UNRELIABLE


def test_words():
    assert sentence([]) == ""
    assert sentence([STUCK, MIXED]) == "2 of 4 chains are stuck; R-hat is 1.2"
    assert str(Finding(Reason.STUCK, "")) == "chains are stuck"
    assert in_words(Status.OK, ()) == "ok"
    assert in_words(Status.UNRELIABLE, [MIXED]) == "unreliable: R-hat is 1.2"


RESULTS = [
    Diagnostics,
    FitResult,
    LogPartitionEstimate,
    LogRatioEstimate,
    ParameterErrors,
    TemperedDraws,
]


@pytest.mark.parametrize("result", RESULTS)
def test_every_result_has_the_same_verdict(result):
    hints = result.__annotations__
    assert hints["status"] is Status
    assert hints["reasons"] == tuple[Finding, ...]
    for status in Status:
        fields = dict.fromkeys(result._fields) | {"status": status, "reasons": ()}
        assert result(**fields).is_reliable is status.is_reliable
    named = hasattr(result, "reason") or hasattr(result, "verdict")
    assert named, result


def test_results_carry_the_reason_itself():
    """Not words that a program would have to search."""
    torch.manual_seed(0)
    energy = pyro_ebm.energies.FunctionEnergy(lambda x: x.square().sum(-1), (3,))
    far = pyro_ebm.energies.QuadraticEnergy(torch.full((3,), 9.0))
    ratio = pyro_ebm.partition.log_ratio(
        energy, far, torch.randn(500, 3), 9 + torch.randn(500, 3)
    )
    assert ratio.status is Status.UNRELIABLE
    assert [finding.reason for finding in ratio.reasons] == [Reason.POOR_OVERLAP]
    assert ratio.reason == ratio.reasons[0].detail
