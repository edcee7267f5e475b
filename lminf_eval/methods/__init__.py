"""Attention methods: each file is one rule of which keys a query sees, and at which distance."""
