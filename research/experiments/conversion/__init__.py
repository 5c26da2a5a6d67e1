"""Prefixes that exist become states: how near they come, in bounds, in documents and in prefix-tuning adapters."""
