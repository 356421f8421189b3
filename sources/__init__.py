"""Where a database comes from: pairs of images and labels, the ISBI 2012 stack, synthetic images."""
