"""The recipe of the built-in model: facts, corpus, tokenizer, training, export, score.

`python -m training.make` runs all of it with fixed seeds. The package never imports it.
"""
