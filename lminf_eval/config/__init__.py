"""What a model's configuration says, and what can be set in it."""
