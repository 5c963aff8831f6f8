"""Server-sent events as bytes, their HTTP chunk framing included.

Owns the two framings, so that an event is one bytes object and one write. It must not know what an
event says, nor connections.
"""


def event(data: bytes, chunked: bool) -> bytes:
    """One event of one line of data."""
    if chunked:
        return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)
    return b"data: %b\n\n" % data


def comment(text: str, chunked: bool) -> bytes:
    """A line that clients ignore and proxies count as life."""
    line = b": %b\n\n" % text.encode("ascii")
    return b"%x\r\n%b\r\n" % (len(line), line) if chunked else line


def done(chunked: bool) -> bytes:
    """The end of a good stream."""
    return event(b"[DONE]", chunked)
