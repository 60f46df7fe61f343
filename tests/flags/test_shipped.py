import pytest

from tvaprune import shipped
from tvaprune.errors import InputError
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import save_masks


@pytest.fixture
def tree(tmp_path, make_model, make_masks):
    """A checkout with a model, two masks of it, and the mask of a larger model."""
    model, other = make_model("mistral"), make_model("mistral", hidden_size=40)
    folder = tmp_path / shipped.MODEL
    model.config.save_pretrained(folder)
    for name, masks in {
        "41.50": make_masks(shape_of(model.config)),
        "39.25": make_masks(shape_of(model.config)),
        "5.00": make_masks(shape_of(other.config)),
    }.items():
        save_masks(masks, folder.parent / f"mask_info_{name}.pkl")
    return tmp_path


@pytest.mark.parametrize("flags", [["--do_zero_eval"], ["--do_zero_eval", "True"], ["--do-zero-eval=True"]])
def test_alone_it_takes_the_shipped_model_and_its_best_mask(tree, flags, capsys):
    completed = shipped.complete(flags, tree)
    assert completed[-len(flags) :] == flags
    given = dict(zip(completed, completed[1:], strict=False))
    assert given["--model_name_or_path"] == str(tree / shipped.MODEL)
    assert given["--mask_loc"] == str(tree / "mistral_saves_tva" / "mask_info_39.25.pkl")
    assert given["--zero_eval_tasks"] == "tva_offline"
    assert "--mask_loc" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--do_zero_eval", "False"],
        ["--do_zero_eval", "--model_name_or_path", "m"],
        ["--do_zero_eval", "--mask_loc=k"],
        ["--do_zero_eval", "--mask-loc", "k"],
        ["--do_zero_eval", "--plan", "plan.json"],
        ["--do_train", "--do_zero_eval"],
    ],
)
def test_a_command_that_says_more_stays_as_it_is(tree, flags, capsys):
    assert shipped.complete(flags, tree) == flags
    assert capsys.readouterr().out == ""


def test_without_the_shipped_files_it_says_what_to_give(tmp_path, tree):
    with pytest.raises(InputError, match="is not at .*mini_mistral; give --model_name_or_path"):
        shipped.complete(["--do_zero_eval"], tmp_path / "elsewhere")
    for path in (tree / "mistral_saves_tva").glob("mask_info_[34]*.pkl"):
        path.unlink()
    with pytest.raises(InputError, match="no mask_info_.* fits"):
        shipped.complete(["--do_zero_eval"], tree)
