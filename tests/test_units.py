"""Durations and sizes in the notation that people use."""

import pytest

from tinyoai import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("300", 300),
        ("1.5", 1.5),
        ("90s", 90),
        ("5m", 300),
        ("5M", 300),
        ("1h30m", 5400),
        ("1h1m1s", 3661),
        (" 2h ", 7200),
        ("-1", -1),
        ("-5m", -1),
        ("9" * 400, units.MAX_SECONDS),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert units.seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-", "m", "5x", "1d", "1m1h", "1.", ".5", "nan", "inf", "1e3", "5 m", "--5", "\u0665"]
)
def test_invalid_times(text: str) -> None:
    with pytest.raises(ValueError, match="90s, 5m"):
        units.seconds(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4000000000", 4_000_000_000),
        ("4G", 4 << 30),
        ("1.5g", 3 << 29),
        ("512M", 512 << 20),
        ("512 MiB", 512 << 20),
        ("100kb", 100 << 10),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert units.size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-4G", "4X", "4GG", "1e9", "nan", "9" * 400, "half"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="512M or 4G"):
        units.size(text)
