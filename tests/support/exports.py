"""What the exports' tests write, and read back."""

from support.families import ROWS, make_plan, sliced
from support.folders import uneven
from tvaprune.checkpoint.folder import save_pruned


def saved(make_model, make_masks, folder, row="llama GQA", case=uneven, words=None, **values):
    """Returns the narrower model of a row, cut as a case says, in memory, and its checkpoint."""
    model = make_model(ROWS[row][0], **(ROWS[row][1] | values))
    plan = case(make_plan(model, make_masks))
    narrow = sliced(model, plan)
    return narrow, save_pruned(narrow, plan, words, folder)


def fields_of(path):
    """The fields of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}
