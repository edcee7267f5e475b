"""What the task definitions call: data, documents, tokenizers, metrics."""
