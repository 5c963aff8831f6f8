"""HTTP/1.1 for the server process. Nothing here knows the API or its models.

`listen` opens the socket, `server` owns all connections, `connection` one of them, `request_head` and
`body` read a request, `routing` and `access` decide who may use which handler, `exchange` answers.
"""
