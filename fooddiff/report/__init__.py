"""The report: a run's files in, one HTML page and figures out. Runs no model and imports no JAX."""
