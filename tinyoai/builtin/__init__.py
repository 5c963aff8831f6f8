"""The model in the package: tinyoai-chat.gguf.

It owns the file and nothing else; `training/` is the recipe that made it.
It must not know how it is served.
"""
