"""LM-Infinite's diagnosis (arXiv 2308.16137, section 3): what is out of distribution in a model past its length."""
