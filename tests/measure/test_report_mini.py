import math
import sys

import numpy as np
import pytest
from support import tiny

sys.path.insert(0, str(tiny.ROOT / "script"))
from report_mini import ngram_perplexities  # noqa: E402


def test_ngram_perplexities_by_hand():
    """Training tokens 0 1 0 1 over a vocabulary of 2; held out 0 1.

    Unigram: (2 - .75) / 4 + (.75 * 2 / 4) * 1/2 = .5. Bigram: 0 is followed by 1 twice, (2 - .75) / 2 + (.75 * 1 / 2)
    * .5 = .8125. Trigram: the place has one token before it, so the bigram's.
    """
    train, held_out = np.array([[0, 1, 0, 1]]), np.array([[0, 1]])
    unigram, bigram, trigram = ngram_perplexities(train, held_out, vocabulary=2)
    assert unigram == pytest.approx(2.0)
    assert bigram == pytest.approx(1 / 0.8125)
    assert trigram == pytest.approx(1 / 0.8125)


def test_probabilities_sum_to_one_over_the_vocabulary():
    train = np.array([[0, 1, 2, 0, 2, 2, 1, 0]])
    for context in ([0, 1], [2, 2], [1, 1]):  # the last was never seen
        total = 0.0
        for token in range(3):
            # A window of one context and one prediction more: divide the context's own part out.
            whole = ngram_perplexities(train, np.array([[*context, token]]), vocabulary=3)[2]
            part = ngram_perplexities(train, np.array([context]), vocabulary=3)[2]
            total += math.exp(-2 * math.log(whole) + math.log(part))
        assert total == pytest.approx(1.0)
