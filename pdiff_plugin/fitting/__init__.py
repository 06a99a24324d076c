"""Fitting a generator to a snapshot store."""
