"""The worker: one process that holds one model and decodes for all its requests.

It runs only in a worker process and knows tokens, logits and slots, but no HTTP and no API dialect. `__main__` is
the program, `scheduler` runs the requests, `slots` records the contents of KV sequences, and each engine
implements the protocol in `contract`.
"""
