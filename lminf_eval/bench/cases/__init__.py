"""The cases of a bench. Each module's `jobs` says which measurements it would make and how long each may take."""
