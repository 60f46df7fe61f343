"""Pages that a model writes: how they open, how long they are, and that they are drawn as the model predicts."""

import numpy as np
import pytest
import torch
from support import tiny
from support.byte_tokenizer import byte_tokenizer
from support.families import MORE_ROWS, ROWS
from transformers import AutoTokenizer

from tvaprune.errors import InputError
from tvaprune.text import sampled
from tvaprune.text.sampled import KINDS, check_page, kinds_of, longest_page, openings, pages, words_of

MINI = tiny.ROOT / "mistral_saves_tva" / "mini_mistral"
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>the system\n{% endif %}"
    "{% for turn in messages %}{{ turn['role'] + ' says ' + turn['content'] + '</s>' }}{% endfor %}"
)
SEED = (3, 1)


@pytest.fixture
def asked():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def writer(make_model):
    return make_model(vocab_size=258)


def ids_of(monkeypatch, tokenizer, *given):
    """The tokens of the pages, as they are decoded; vocabulary's words are decoded before them."""
    seen = []
    monkeypatch.setattr(tokenizer, "decode", lambda row: seen.append(row) or "")
    return seen[-len(pages(given[0], tokenizer, *given[1:])) :]


def test_a_document_opens_with_a_word_of_the_vocabulary():
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    words = words_of(tokenizer)
    said = [tokenizer.decode([word]) for word in words]
    assert len(words) > 400 and all(word.strip().isalpha() and len(word.strip()) > 2 for word in said)
    assert "the" in {word.strip() for word in said} and " " not in "".join(word.strip() for word in said)
    opened = openings(tokenizer, "document", 200, np.random.default_rng(0))
    assert set(opened[:, -1].tolist()) <= set(words) and len(set(opened[:, -1].tolist())) > 100


def test_a_vocabulary_that_marks_no_words_opens_with_any_token_but_a_special_one():
    tokenizer = byte_tokenizer()
    assert set(words_of(tokenizer)) == set(range(2, 258))


def test_a_conversation_opens_with_what_stands_before_the_words_of_a_user(asked):
    opened = openings(asked, "conversation", 3, np.random.default_rng(0))
    assert opened.shape[0] == 3 and len({tuple(row) for row in opened.tolist()}) == 1
    assert asked.decode(opened[0].tolist()) == "<s>the system\nuser says "
    assert kinds_of(asked) == KINDS and kinds_of(byte_tokenizer()) == ("document",)


def test_a_chat_template_that_cannot_be_used_is_told_and_one_that_opens_nothing_opens_no_page(asked):
    for broken in ("{% for turn in messages %}", "{{ raise_exception('no system') }}"):
        asked.chat_template = broken
        with pytest.raises(InputError, match="the tokenizer's chat template cannot be used .*; mend it"):
            kinds_of(asked)
    asked.chat_template = "{{ messages[0]['content'] }}</s>"
    assert kinds_of(asked) == ("document",)


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_is_as_long_as_asked_whatever_ends_its_texts(writer, asked, kind, monkeypatch):
    writer.generation_config.eos_token_id = list(range(258))  # whatever it says ends a text
    rows = ids_of(monkeypatch, asked, writer, kind, 5, 48, 1.0, SEED)
    assert [len(row) for row in rows] == [48] * 5 and len({tuple(row) for row in rows}) == 5


def test_the_token_that_begins_every_text_is_no_part_of_a_page(writer, asked, monkeypatch):
    plain = ids_of(monkeypatch, asked, writer, "document", 4, 16, 1.0, SEED)
    start = asked.bos_token_id
    monkeypatch.setattr(type(asked), "__call__", lambda self, text, **_: {"input_ids": [start]})
    begun = ids_of(monkeypatch, asked, writer, "document", 4, 16, 1.0, SEED)
    assert [len(row) for row in begun] == [15] * 4 and [row[0] for row in begun] == [row[0] for row in plain]


def test_a_seed_settles_the_pages_and_another_gives_others(writer, asked):
    first, again, other = (pages(writer, asked, "document", 4, 24, 1.0, seed) for seed in (SEED, SEED, (3, 2)))
    assert first == again and not set(first) & set(other)


def test_tokens_are_drawn_as_the_model_predicts_at_the_temperature(writer, asked, monkeypatch):
    count, opened = 4000, openings(asked, "conversation", 1, np.random.default_rng(0))
    with torch.no_grad():
        logits = writer(opened).logits[0, -1]
    for temperature in (1.0, 0.5):
        rows = ids_of(monkeypatch, asked, writer, "conversation", count, opened.shape[1] + 1, temperature, SEED)
        drawn = torch.bincount(torch.tensor([row[-1] for row in rows]), minlength=258) / count
        expected, wrong = (torch.softmax(logits / heat, -1) for heat in (temperature, 1.5 - temperature))
        noise = (expected * (1 - expected) / count).sum().sqrt()
        assert (drawn - expected).norm() < 2 * noise < (drawn - wrong).norm()


@pytest.mark.parametrize("row", (ROWS | MORE_ROWS).values(), ids=ROWS | MORE_ROWS)
def test_every_family_writes_on_what_it_wrote_before(row, make_model, asked, monkeypatch, other_families):
    """Next to no temperature leaves the likeliest token, which the model without a cache finds too."""
    model = make_model(row[0], **row[1])
    tokens = min(20, longest_page(model.config))
    monkeypatch.setattr(sampled, "words_of", lambda tokenizer: [5, 7, 11])
    rows = torch.tensor(ids_of(monkeypatch, asked, model, "document", 3, tokens, 1e-6, SEED))
    with torch.no_grad():
        likeliest = model(rows, use_cache=False).logits.argmax(-1)
    assert rows.shape == (3, tokens) and torch.equal(rows[:, 1:], likeliest[:, :-1])


def test_a_page_without_room_beside_the_opening_of_any_kind_is_refused(asked):
    opening = openings(asked, "conversation", 1, np.random.default_rng(0)).shape[1]
    check_page(asked, opening + 1)
    with tiny.refused(f"--page {opening}: a conversation opens with {opening} tokens; give {opening + 1} or more"):
        check_page(asked, opening)
