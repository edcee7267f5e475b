"""Grids of evaluations that lose nothing when they are killed."""
