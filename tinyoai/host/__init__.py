"""The machine: data directory, atomic files, locks, memory, processes."""
