"""Fine-tuning: a queue of jobs, each of which trains a model further in a process of its own."""
