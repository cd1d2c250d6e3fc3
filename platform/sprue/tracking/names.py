"""Names of registered models: ``<dataset>.<class>``, or the class alone where only one dataset has it."""

import string
from collections.abc import Sequence
from urllib.parse import quote

from sprue.errors import SprueError

LOCK = "sprue-lock-"
"""Begins the name of a registered model that is a lock; the name of what it locks follows."""
LISTED = 20
"""Names that a message lists."""


class UnknownClassError(SprueError):
    """No registered model has the name."""


class AmbiguousClassError(SprueError):
    """Several datasets have a class of the name."""


def resolve_name(name: str, candidates: Sequence[str]) -> str:
    """The full name of the registered model that a user means.

    Args:
        name: A model's full name, or a class's name where only one dataset has it.
        candidates: The full names, ``<dataset>.<class>``; a dataset's name has no dot, a class's may have some.

    Raises:
        UnknownClassError: If no candidate has the name; the message lists the candidates.
        AmbiguousClassError: If several datasets have a class of the name; the message lists these candidates.

    >>> resolve_name("brick", ["metal.rod", "textures.brick"])
    'textures.brick'
    >>> resolve_name("bolt", ["metal.rod", "textures.brick"])
    Traceback (most recent call last):
    ...
    sprue.tracking.names.UnknownClassError: there is no class 'bolt'; there are: metal.rod, textures.brick
    >>> resolve_name("brick", ["metal.brick", "textures.brick"])
    Traceback (most recent call last):
    ...
    sprue.tracking.names.AmbiguousClassError: class 'brick' is ambiguous: write metal.brick or textures.brick
    """
    if name in candidates:
        return name
    found = sorted(each for each in candidates if each.partition(".")[2] == name)
    if not found:
        raise UnknownClassError(f"there is no class {name!r}; there are: {_listed(sorted(candidates))}")
    if len(found) > 1:
        raise AmbiguousClassError(f"class {name!r} is ambiguous: write {' or '.join(found)}")
    return found[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) or "none") + more


def label(name: str) -> str:
    """A name as a metric's label, of which Ray takes ASCII alone; other characters are percent-encoded.

    >>> label("textures.gräs 2")
    'textures.gr%C3%A4s 2'
    """
    return quote(name, safe=string.printable)
