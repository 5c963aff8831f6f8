"""The server's models: names, files, loaded models and the processes that run them.

`Pool` holds names and the memory budget, `ManagedModel` one model's life, `Lease` a use of it, `Worker` its
process. Knows neither HTTP nor any API.
"""
