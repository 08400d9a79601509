"""The type of the fixture `note`, which adds a sentence to the figures that a run prints in its end."""

from collections.abc import Callable

Note = Callable[[str], None]
