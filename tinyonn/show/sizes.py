"""Sizes in bytes, as people write them: ``8GiB``, ``8GB``, ``500MiB``."""

from __future__ import annotations

import re

from tinyonn.errors import InputError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}
GiB = 1 << 30
LARGEST = 1 << 62  # that anyone means
MiB = 1 << 20


def parse_size(text: str, option: str = "size") -> int:
    """Turn ``8GiB`` (1024-based), ``8GB`` (1000-based), ``1.5 TiB`` or a plain number of bytes into bytes.

    Parameters
    ----------
    text : str
        Upper or lower case, with or without a space before the unit.
    option : str
        Named in the error.

    Raises
    ------
    InputError
        Not a size, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.ASCII | re.IGNORECASE)
    factor = UNITS.get(match[2].upper()) if match else None
    wanted = float(match[1]) * factor if match and factor else 0.0
    size = int(wanted) if wanted < LARGEST else 0
    if size < 1:
        raise InputError(f"{option} = {text!r} is not a size above 0; write it like 8GiB, 8GB or 500MiB")
    return size


def format_size(size: float) -> str:
    """Bytes for people, 1024-based, three digits: ``7.45 GiB``, ``512 B``."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:#.3g} {unit}".replace(". ", " ")


def format_count(count: float) -> str:
    """A large number for people: ``3.95 billion``, ``5,512,192``."""
    return f"{count / 1e9:,.2f} billion" if count >= 1e9 else f"{count:,.0f}"


def format_seconds(seconds: float) -> str:
    """A time for people: ``8.2 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
