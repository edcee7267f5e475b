"""What methods keep of a sequence: its starting tokens and window, or all keys."""
