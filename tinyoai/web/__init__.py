"""HTTP/1.1 for the server process, without OpenAI's words.

`gate` reads heads strictly, `protocol` owns connections, `exchange` one request and its response,
`sse` events as bytes, `router` and `guard` decide who is served by what. No model is known here.
"""
