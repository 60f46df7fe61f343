"""The settings of a gate training as they are resolved, and how often masks are scored."""

import pytest

from tvaprune.choose.settings import Cadence, describe, gate_settings
from tvaprune.errors import InputError
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.plan.widths import WidthRules


def test_a_target_that_rises_beyond_the_choice_is_refused():
    def settings(**prune):
        return gate_settings(PruneSettings(**prune), DistillSettings(), 8, 8, 5.0, WidthRules(4))

    with pytest.raises(InputError, match="--lagrangian_warmup_epochs is 0.9: .* 7 steps, .* stands after 5 of 8"):
        settings(lagrangian_warmup_epochs=0.9)
    assert settings(lagrangian_warmup_epochs=0.9, settle_share=0.0).num_warmup_steps == 7
    few = gate_settings(
        PruneSettings(), DistillSettings(), 10, 1000, 5.0, WidthRules(4)
    )  # --max_steps 10 of an epoch of 1,000
    assert few.num_warmup_steps == 3 and few.num_settle_steps == 3


def test_the_sharpness_begins_low_and_never_above_its_end():
    def begins(**given):
        chosen = gate_settings(PruneSettings(**given), DistillSettings(), 100, 100, 10.0, WidthRules())
        return chosen.beta_start, chosen.beta

    assert begins() == (0.5, 10.0)
    assert begins(beta_start=10, beta=5) == (5, 5)  # as the paper, whose sharpness is constant, for every family


def test_the_heads_share_of_the_information_loss_follows_the_target():
    def share(target, **given):
        chosen = PruneSettings(target_sparsity=[target], **given)
        return gate_settings(chosen, DistillSettings(), 100, 100, 10.0, WidthRules()).att_mul

    assert (share(0.6), share(0.61), share(0.61, att_mul=3)) == (256, 512, 3)


def test_how_the_steps_are_spent_is_said_and_what_they_cannot_reach():
    def said(steps, **given):
        chosen = gate_settings(PruneSettings(**given), DistillSettings(), steps, steps, 10.0, WidthRules())
        return describe(chosen, steps)

    assert "rises over 90 of 300 steps, the choice stands after 201;" in said(300) and "note:" not in said(300)
    # 67 of 100 steps at a rate that falls from 0.1 to 0.033: 67 * 0.0665 = 4.46 of the 5 that the cut is away.
    assert "by 4.5 at most, and the cut is 5 away" in said(100)
    assert "note:" not in said(100, vib_learning_rate=0.2)


def test_scoring_takes_a_quarter_of_the_work_at_most():
    # The main job: 300 steps of 4 x 256 tokens passed 3 times, 128 blocks scored. Of 921,600 passes a quarter is
    # 230,400, 7 scorings of 32,768: every 43 steps would do, 50 is the least. 6 of them are 196,608 of 921,600, 21%.
    main_job = Cadence(300, 4 * 256, 128 * 256, distill=True)
    assert main_job.interval(50) == 50 and main_job.share(50) == pytest.approx(196_608 / 921_600)
    # 4,500 steps of 512 tokens: 6,912,000 passes, a quarter 1,728,000 is 26 scorings of 65,536: every 174 steps.
    released = Cadence(4500, 512, 128 * 512, distill=True)
    assert released.interval(50) == 174 and released.share(174) <= 0.25 < released.share(173)
    assert Cadence(4500, 512, 128 * 512, distill=False).interval(50) == 265  # two passes a step: 17 scorings
    assert Cadence(8, 48, 128 * 512, distill=True).interval(1) == 8  # the last step's always, whatever it costs


def test_which_cadence_was_taken_is_said_and_why():
    main_job, released = Cadence(300, 1024, 128 * 256, True), Cadence(4500, 512, 128 * 512, True)
    tail = "% of the training's work at most"
    assert main_job.describe(None, 50) == f"scoring: --eval_steps 50, the default; it costs 21{tail}"
    assert released.describe(None, 50) == (
        f"scoring: --eval_steps 174, every 50 would cost 85%, the limit is 25%; it costs 25{tail}"
    )
    assert released.describe(50, 50) == f"scoring: --eval_steps 50, as given; it costs 85{tail}"
    assert released.describe(0.1, 50) == f"scoring: --eval_steps 450, as given; it costs 9{tail}"
