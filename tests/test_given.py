"""What the flags name, read before the model."""

import json
from types import SimpleNamespace

from tvaprune.given import _begun_with
from tvaprune.identity import IDENTITY_NAME
from tvaprune.outputs import PLAN_NAME


def test_a_run_began_with_the_multiple_of_its_checkpoint_or_of_its_plan(tmp_path):
    def told():
        training = SimpleNamespace(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        return _begun_with(SimpleNamespace(training=training, output_dir=tmp_path, save_loc=tmp_path))

    assert told() is None
    (tmp_path / PLAN_NAME).write_text(json.dumps({"dim_multiple": 8}))  # an earlier run's, or this one's
    assert told() == 8
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / IDENTITY_NAME).write_text(json.dumps({"settings": {"dim_multiple": 16}}))
    assert told() == 16
