"""OpenAI's words: what requests and answers look like, and what each field means.

Handlers take an Exchange, decode its body once into a typed struct, turn it into wire messages and
their events into chunks. No token, logit or socket is known here.
"""
