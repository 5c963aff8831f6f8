"""Text on its way into and out of a model.

`template` turns messages into segments, `tokens` segments into ids, `emit` an answer's bytes into
text. All pure: values in, values out; no socket, no process, no model file is known here.
"""
