"""What lets a stopped run go on: answers in a journal, checkpoints inside a document, signals heard in time."""
