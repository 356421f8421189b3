"""A trained network on images of any size: tiles, objects, the files of a run, exports."""
