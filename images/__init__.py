"""Image files of microscopes: read as frames by rows, written by rows."""
