"""Evaluation of images: feature networks and distances between sets of features."""
