"""`xdplb decap`, for backends."""
