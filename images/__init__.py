"""Microscope image files: reading and writing by rows, geometry and statistics."""
