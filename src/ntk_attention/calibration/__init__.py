"""The start of an adapter: near the frozen model, in coordinates that train well."""
