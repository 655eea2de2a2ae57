"""The rules of scoring, on texts and numbers."""

import itertools

import pytest

from hf_phibalance import evaluation
from hf_phibalance.evaluation import (
    GSM8K_STOPS,
    extract_flexible,
    extract_strict,
    pass_at_k,
    truncate,
)


def test_what_is_read_from_an_answer():
    assert extract_strict("#### 1 and #### 2") == "1" and extract_strict("#### -1,5.0x") == "-1,5.0"
    assert extract_strict("###  3") == extract_flexible("none") == evaluation.INVALID == "[invalid]"
    assert extract_flexible("3 of 5") == "5" and extract_flexible("5 of $3,0.") == "$3,0."
    assert truncate("#### 1</s>Question: a", GSM8K_STOPS) == "#### 1"
    assert truncate("    return 1\nif x:\n    y\ndef f", ("\ndef", "\nif")) == "    return 1"


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            verdicts = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                choices = list(itertools.combinations(verdicts, k))
                expected = sum(any(choice) for choice in choices) / len(choices)
                assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)
    for wrong in ((1, 0, 2), (1, 2, 1), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="needs 1 <= k <= samples"):
            pass_at_k(*wrong)
