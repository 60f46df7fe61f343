"""What models add to prompts: greedy, the same in a batch and alone, whatever settings came with the checkpoint."""

import pytest
import torch
from support.byte_tokenizer import byte_tokenizer

from tvaprune.measure.generations import PROMPTS, answers, continuations, pieces

GIVEN = [[3, 1, 4, 1, 5, 9], [2, 6], [7], [8, 2, 8, 1]]
COUNT = 7


@pytest.fixture
def model(make_model):
    return make_model()


def greedy(model, ids):
    """The oracle: the likeliest token of the whole text so far, without a cache."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(COUNT):
            found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_prompts_of_any_lengths_go_on_with_the_likeliest_tokens(model, make_model):
    state = torch.get_rng_state()
    found = continuations(model.train(), GIVEN, COUNT, None)
    assert model.training and torch.equal(torch.get_rng_state(), state)  # what follows in a run is as it was
    assert found == [greedy(model.eval(), ids) for ids in GIVEN]
    assert continuations(make_model(seed=1), GIVEN, COUNT, None) != found  # control


def test_settings_that_came_with_a_checkpoint_do_not_choose(model):
    plain = continuations(model, GIVEN, COUNT, None)
    for name, value in (("do_sample", True), ("repetition_penalty", 9.0), ("num_beams", 3), ("no_repeat_ngram_size", 1),
                        ("use_cache", False)):  # fmt: skip
        setattr(model.generation_config, name, value)
    assert continuations(model, GIVEN, COUNT, None) == plain
    model.generation_config.do_sample = model.generation_config.num_beams = None
    assert model.generate(torch.tensor(GIVEN[:1]), max_new_tokens=COUNT)[0, 6:].tolist() != plain[0]  # control


@pytest.mark.parametrize("several", [False, True])
def test_a_text_that_its_model_ends_is_no_longer(several, model):
    plain = continuations(model, GIVEN, COUNT, None)
    end = plain[0][2]
    model.generation_config.eos_token_id = [end, 46] if several else end
    ended = continuations(model, GIVEN, COUNT, 0)
    wanted = [ids[: ids.index(end) + 1] if end in ids else ids for ids in plain]
    assert ended == wanted and len(ended[0]) <= 3 and ended != plain
    assert any(len(ids) == COUNT for ids in ended)  # control: others go on


def test_answers_are_the_pieces_of_what_follows_each_prompt(make_model):
    model, tokenizer = make_model(vocab_size=300, max_position_embeddings=128), byte_tokenizer()
    found = answers(model, tokenizer, 5)
    assert len(found) == len(PROMPTS) and all(len(parts) == 5 for parts in found)
    ids = tokenizer(PROMPTS[1]).input_ids
    assert found[1] == pieces(tokenizer, continuations(model, [ids], 5, None)[0])


def test_what_a_model_says_is_parted_into_what_each_token_adds(tmp_path):
    tokenizer, text = byte_tokenizer(), "é, 10 € <b>"
    ids = tokenizer(text).input_ids
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text and len(parts) == len(ids) == len(text.encode()) > len(text)
    assert parts[:3] == ["", "é", ","]  # a letter of two tokens comes with its last
    assert "".join(pieces(tokenizer, ids[:-5])) == "é, 10 \ufffd"  # cut within one: as the model's text is
