"""A model is found by its full name, or by its class where that is unambiguous."""

import pytest

from sprue.tracking.names import AmbiguousClassError, UnknownClassError, resolve_name

NAMES = ["textures.gräs 2", "textures.brick", "metal.brick", "metal.m4.bolt", "textures.metal.brick"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, name) for name in NAMES),
        ("gräs 2", "textures.gräs 2"),
        ("m4.bolt", "metal.m4.bolt"),  # a class's name may have a dot
    ],
)
def test_full_names_and_unambiguous_classes_are_found(name, expected):
    assert resolve_name(name, NAMES) == expected


def test_an_ambiguous_class_lists_the_models_that_have_it():
    with pytest.raises(AmbiguousClassError) as refusal:
        resolve_name("brick", NAMES)
    assert str(refusal.value) == "class 'brick' is ambiguous: write metal.brick or textures.brick"


@pytest.mark.parametrize("name", ["bolt", "Brick", "textures", "textures.", ".brick", "textures.bolt", ""])
def test_an_unknown_class_lists_all_models(name):
    with pytest.raises(UnknownClassError) as refusal:
        resolve_name(name, NAMES)
    assert str(refusal.value) == f"there is no class {name!r}; there are: {', '.join(sorted(NAMES))}"


def test_an_empty_registry_has_no_classes():
    with pytest.raises(UnknownClassError, match="there are: none"):
        resolve_name("brick", [])
