"""Samples: images, the questions asked about them, and the answers where they are known."""
