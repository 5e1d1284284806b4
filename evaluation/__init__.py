"""Metrics of sets of uint8 images: features, distances, protocol and tables."""
