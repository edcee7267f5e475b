"""`lminf bench`: speed and memory against the plain model and `--model hf`, in paired runs, and against the machine."""
