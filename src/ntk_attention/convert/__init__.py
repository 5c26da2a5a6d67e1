"""Given prefixes, caches and documents as adapters."""
