"""The attention operation: torch alone, and nothing that knows a model."""
