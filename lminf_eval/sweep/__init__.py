"""Grids of evaluations: one stock lm_eval run a cell, here or on SLURM, each resumed if interrupted."""
