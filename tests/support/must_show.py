"""The type of the acceptance suites' fixture; a conftest cannot be imported."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

MustShow: TypeAlias = Callable[[str], AbstractContextManager[list[str]]]
"""`with must_show("2 identity") as figures:` prints the line at its end, with the figures appended in it."""
