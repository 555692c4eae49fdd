"""The experiment of arXiv 2502.04315, as published and under an honest loss."""
