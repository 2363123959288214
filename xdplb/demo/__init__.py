"""`xdplb demo`."""
