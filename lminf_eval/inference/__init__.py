"""Tokens through a model: scoring and generation, each shared prefix computed once."""
