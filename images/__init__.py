"""Image files of microscopes: read as frames by rows, measured, written by rows."""
