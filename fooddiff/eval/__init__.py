"""Scores images: Inception features, Fréchet and kernel distances, precision and recall, with provenance."""
