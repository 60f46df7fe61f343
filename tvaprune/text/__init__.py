"""Documents -> blocks of tokens.

In: a name or a path, a split, a tokenizer. Out: `blocks.token_blocks`. A new text set is an entry of `sources`.
"""
