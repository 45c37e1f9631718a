"""A model's checkpoint on disk: where it is, whether it is whole, what it configures, its tensors, its download.

Import the modules themselves: `download` and `official` take long to import, and the others must not.
"""
