"""lm-eval's results and samples, ours or anyone's, as tables, figures and one page that a paper can cite."""
