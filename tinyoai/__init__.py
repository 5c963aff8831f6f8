"""tinyoai: a small local LLM server that speaks OpenAI's HTTP API.

This package is the server and its workers; `python -m tinyoai` starts both.
It knows its version and nothing else, so that importing it costs nothing.
"""

__version__ = "0.1.0"
