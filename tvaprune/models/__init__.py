"""The only room that knows names inside a model.

In: a checkpoint's folder or hub id. Out: a stock or pruned model with its family's row, its sizes, and one tensor per
kind of prunable unit. A new family is a row in `families`, its classes in `modeling_pruned` and `auto_classes`, and a
row in ``tests/models/test_family_contract.py``. Importing the room registers the pruned classes with transformers.
"""

from tvaprune.models.auto_classes import register

register()
