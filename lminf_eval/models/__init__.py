"""A transformers model whose attention is taken over from outside, and verified."""
