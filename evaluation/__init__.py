"""How good a segmentation is, and how that is shown: scores, pictures, the results page."""
