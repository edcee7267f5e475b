"""`lminf bench`: speed and memory against the plain model and `--model hf`, in paired runs, and against the machine."""

FORMAT = "lminf-bench-1"  # what its file says it is
