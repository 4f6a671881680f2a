"""What models answer over a dataset, and what those answers are worth against the unreduced model."""
