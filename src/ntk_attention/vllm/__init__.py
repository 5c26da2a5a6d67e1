"""Serving with vLLM: a plugin that it finds by itself. Nothing of vLLM is imported before it asks."""
