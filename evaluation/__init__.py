"""Evaluation of segmentations: scores, pictures and the results page."""
