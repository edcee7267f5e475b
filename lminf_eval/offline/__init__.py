"""Fetching all that a run needs, so that it works without a network."""
