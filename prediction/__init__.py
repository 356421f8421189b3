"""Segmenting images of any size with a trained network: tiles, objects, output files, exports."""
