"""The worker: one process that holds one model and decodes for all its requests.

Runs only in a worker process. It knows tokens, logits and slots; it knows no HTTP and none of
OpenAI's words. `__main__` is the program, `decode` the scheduler, `slots` the KV cache's
book-keeping, and one module for each engine stands behind the protocol in `base`.
"""
