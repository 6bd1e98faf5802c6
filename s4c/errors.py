"""Errors that speak to the user: what was wrong, which values are allowed, what to do.

A plain `ValueError` says that an argument is outside its range. The classes here are for what a caller
may want to tell apart; all of them are `ValueError`s, so one `except` catches every bad input.
"""


class UnsupportedModel(ValueError):
    """The model asks for something that this runtime would compute wrongly, so it is refused."""


class WrongTarget(ValueError):
    """A drafter was loaded for a target that it was not trained for."""


class CorruptCheckpoint(ValueError):
    """A checkpoint is truncated, misses a file or a tensor, or holds tensors of another shape."""


class BadLogits(ValueError):
    """A model produced NaN (or only -inf) where a token had to be chosen; nothing was sampled."""
