"""Models as the server sees them: which there are, which are loaded, and the processes that run them.

`Pool` holds names and the memory budget, `ManagedModel` one model's life, `Lease` a use of it, `Worker` its
process. Knows neither HTTP nor any API.
"""
