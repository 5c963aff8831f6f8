"""The HTTP API: `generation` is the neutral core, `openai` its dialect, `routes` the table of all endpoints.

A handler decodes the body of an Exchange into a typed struct, runs wire bodies on a Lease, and encodes the events.
"""
