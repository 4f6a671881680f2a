"""Evaluation: predictions over a dataset, their scores, and the comparison with the unreduced model."""
