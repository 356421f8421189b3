"""Sources of a database: pairs of images and labels, the ISBI 2012 stack, synthetic images."""
