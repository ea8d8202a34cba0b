"""Reads the options that are lists: "2k,8k", "exact,paper", "hidden=512,layers=8"."""

from collections.abc import Collection, Mapping

import torch
import typer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SUFFIXES = {"k": 1024, "m": 1024 * 1024}


def parse_counts(text: str) -> tuple[int, ...]:
    """Positive whole numbers separated by commas; k and m stand for 1,024 and its square.

    Raises:
        typer.BadParameter: one of them is none.
    """
    return tuple(_count(part) for part in split_list(text))


def _count(text: str) -> int:
    digits, factor = text.lower(), 1
    if digits[-1] in _SUFFIXES:
        digits, factor = digits[:-1], _SUFFIXES[digits[-1]]
    if not digits.isdecimal() or not int(digits):
        raise typer.BadParameter(f"{text!r} is no positive whole number (such as 512 or 32k)")
    return int(digits) * factor


def parse_names(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Names separated by commas, none twice.

    Raises:
        typer.BadParameter: one of them is not known.
    """
    names = tuple(dict.fromkeys(split_list(text)))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return names


def parse_settings(text: str, defaults: Mapping[str, int]) -> dict[str, int]:
    """Settings such as "hidden=512,layers=8" over the defaults.

    Raises:
        typer.BadParameter: an unknown key, or no positive whole number.
    """
    settings = dict(defaults)
    for part in split_list(text):
        key, sign, value = part.partition("=")
        if not sign or not value or key not in settings:
            raise typer.BadParameter(
                f"{part!r} is no setting; there are {', '.join(settings)}, as in hidden=512"
            )
        settings[key] = _count(value)
    return settings


def split_list(text: str) -> list[str]:
    """What commas separate.

    Raises:
        typer.BadParameter: a part is empty.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise typer.BadParameter(f"{text!r} is no list separated by commas")
    return parts
