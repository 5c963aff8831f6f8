"""The ctransformers engine."""
