"""The only room that knows names inside a model.

In: a checkpoint's folder or hub id. Out: a stock or pruned model with its family's row, its sizes, and one tensor per
kind of prunable unit. A new family is a row in `families`, its classes' name in `modeling_pruned`, and a row in
``tests/support/families.py`` and ``model_table.py``. Importing the room registers the pruned classes with transformers.
"""

from tvaprune.models.auto_classes import register

register()
