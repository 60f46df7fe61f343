"""What a checkpoint's own modeling file tells an older transformers."""

import pytest

from tvaprune.models.modeling_pruned import rope_of_transformers_4

LISTS = {"short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]}
LINEAR = {"rope_type": "linear", "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        (PLAIN | {"partial_rotary_factor": 0.5},
         {"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_scaling": None}),
        (LINEAR | {"rope_theta": 5000.0}, {"rope_theta": 5000.0, "rope_scaling": LINEAR}),
        ({"full_attention": LINEAR | {"rope_theta": 5000.0}, "sliding_attention": PLAIN},
         {"rope_theta": 5000.0, "rope_scaling": LINEAR, "rope_local_base_freq": 100.0}),
        ({"rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 8} | LISTS,
         {"rope_theta": 5000.0, "original_max_position_embeddings": 8, "rope_scaling": {"type": "longrope"} | LISTS}),
        ({}, {}),
    ],
)  # fmt: skip
def test_rotary_settings_in_the_words_of_transformers_4(rope, told):
    assert rope_of_transformers_4(rope) == told
