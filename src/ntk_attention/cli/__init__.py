"""The command line, and the fine-tuning behind it."""
