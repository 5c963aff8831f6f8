"""Server-sent events as bytes, including their HTTP chunk framing: one event is one bytes object and one chunk."""


def event(data: bytes, chunked: bool) -> bytes:
    """Returns one event with one line of data."""
    if chunked:
        return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)
    return b"data: %b\n\n" % data


def comment(text: str, chunked: bool) -> bytes:
    """Returns a comment: clients ignore it, and proxies see that the stream is alive."""
    line = b": %b\n\n" % text.encode("ascii")
    return b"%x\r\n%b\r\n" % (len(line), line) if chunked else line


def done(chunked: bool) -> bytes:
    """Returns the event that ends a complete stream."""
    return event(b"[DONE]", chunked)
