"""`xdplb bench`."""
