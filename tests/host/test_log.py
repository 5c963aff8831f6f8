"""Log lines: one line each, whatever a client sent."""

from tinyoai.host.log import MAX_LINE, clean


def test_log_lines_cannot_be_forged() -> None:
    assert clean("a\r\nb\x1b[2Jc") == "a\\r\\nb\\x1b[2Jc"
    assert len(clean("x" * 10**6)) < MAX_LINE + 10
