"""LM-Infinite's Λ-attention for EleutherAI's lm-evaluation-harness.

Nothing is imported here: a Python start-up hook imports this package (see `plugin.py`), and must cost nothing.
"""

__version__ = "0.1.0"
