"""Loaded models, as the server sees them.

`worker` starts one process and speaks with it by the law of the wire; `pool` decides which models
run and keeps them up. Both run in the server and know neither HTTP nor OpenAI's words.
"""
