"""Families of models: `table.py` has a row for each, `registry.py` judges the others by their code.

The general mechanism of `patching.py` needs no code here. A family with a file of its own has its attention modules'
`forward` replaced from outside, by one that uses the module's own projections and leaves the attention to
`PatchedModel.attend`.
"""
