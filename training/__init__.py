"""The recipe that makes the built-in model from nothing: facts, corpus, tokenizer, training, export, score.

`python -m training.make` runs all of it with fixed seeds. It is for development only: the package never
imports it, and neither running nor testing tinyoai needs torch.
"""
