"""A trained network on an image of any size: tiles, objects, exports."""
