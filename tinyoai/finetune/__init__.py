"""Fine-tuning: jobs that train a model further on examples, each in a process of its own.

Owns jobs, examples and training. It must not know HTTP, nor how models are served: a finished job hands over
a file.
"""
