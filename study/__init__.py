"""Which decay, and whether to average at all: runs, evaluation and tables."""
