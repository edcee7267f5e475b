"""lm-eval on one side, tokens on the other."""
