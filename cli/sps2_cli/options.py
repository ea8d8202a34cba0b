"""Options that several commands share."""

from enum import StrEnum
from typing import Annotated, TypeAlias

import typer

DEFAULT_ADDRESS = "127.0.0.1:50051"

Server: TypeAlias = Annotated[
    str, typer.Option(help="HOST:PORT of the router.", envvar="SPS2_SERVER", metavar="HOST:PORT")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Reuse(StrEnum):
    """Which KV of earlier prompts a request may begin with."""

    EXACT = "exact"
    ADOPT = "adopt"
    OFF = "off"


def parse_token_ids(text: str) -> list[int]:
    """Token ids separated by commas or spaces.

    Raises:
        ValueError: not whole numbers, or none at all.
    """
    parts = text.replace(",", " ").split()
    if not parts:
        raise ValueError("no token ids")
    return [int(part) for part in parts]


def parse_logit_bias(text: str) -> dict[int, float]:
    """Biases by token id, as in "17=-100,5=2.5".

    Raises:
        ValueError: not ID=NUMBER, or an id twice.
    """
    biases: dict[int, float] = {}
    for part in text.replace(",", " ").split():
        token_id, equals, bias = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is not ID=NUMBER")
        if int(token_id) in biases:
            raise ValueError(f"token id {token_id} has two biases")
        biases[int(token_id)] = float(bias)
    return biases
