"""The Λ computation. `reference.py` defines it; `banded.py` makes it linear in length; both agree."""
