"""What the package offers, and that its two clients offer the same."""

import inspect
from importlib.resources import files

import sps2_client
from sps2_client import AsyncClient, AsyncStream, Client, SPS2Error, StatusError, Stream


def public(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") and callable(member)
    }


def test_all_names_exist_and_nothing_else_is_public() -> None:
    assert sorted(sps2_client.__all__) == sorted(set(sps2_client.__all__))
    public_names = {name for name in vars(sps2_client) if not name.startswith("_")}
    assert public_names == set(sps2_client.__all__)


def test_both_clients_have_the_same_surface() -> None:
    blocking, asynchronous = public(Client), public(AsyncClient)
    assert blocking.keys() == asynchronous.keys()
    for name, signature in blocking.items():
        assert list(signature.parameters) == list(asynchronous[name].parameters), name
    assert public(Stream).keys() == public(AsyncStream).keys()


def test_everything_public_is_described() -> None:
    for name in sps2_client.__all__:
        value = getattr(sps2_client, name)
        if not isinstance(value, type):
            continue
        assert value.__doc__, name
        for member_name, member in vars(value).items():
            if not member_name.startswith("_") and (
                inspect.isfunction(member) or isinstance(member, property)
            ):
                assert inspect.getdoc(member), f"{name}.{member_name}"


def test_types_are_shipped() -> None:
    assert (files(sps2_client) / "py.typed").is_file()


def test_every_error_is_in_the_tree_and_drawn() -> None:
    drawing = inspect.getdoc(inspect.getmodule(SPS2Error)) or ""
    kinds = [
        value
        for value in vars(sps2_client).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    for kind in kinds:
        assert issubclass(kind, SPS2Error)
        assert kind.__name__ in drawing
    assert len(StatusError.__subclasses__()) == 15
