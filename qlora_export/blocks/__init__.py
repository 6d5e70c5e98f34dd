"""One decoder block at a time: opened by its weights, run, and asked for what flows through it."""
