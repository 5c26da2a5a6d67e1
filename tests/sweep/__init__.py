"""A tiny random model of every model type of the installed transformers, and what an adapter does to it."""
