"""The attention of methods: `reference.py` defines it, the other files make it fast, one for each shape of key set."""
