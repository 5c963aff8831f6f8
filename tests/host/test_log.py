"""Log lines: one line each, for any bytes from a client."""

from tinyoai.host.log import MAX_LINE, clean


def test_log_lines_cannot_be_forged() -> None:
    assert clean("a\r\nb\x1b[2Jc") == "a\\r\\nb\\x1b[2Jc"
    assert len(clean("x" * 10**6)) < MAX_LINE + 10
