"""The bytes of server-sent events."""

from tinyoai.web import sse


def test_event_bytes() -> None:
    assert sse.event(b'{"a":1}', False) == b'data: {"a":1}\n\n'
    assert sse.event(b'{"a":1}', True) == b'f\r\ndata: {"a":1}\n\n\r\n'
    assert sse.comment("ping", False) == b": ping\n\n"
    assert sse.comment("ping", True) == b"8\r\n: ping\n\n\r\n"
    assert sse.done(True) == b"e\r\ndata: [DONE]\n\n\r\n"
