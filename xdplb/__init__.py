"""xdplb: a layer-4 load balancer whose packet path is one XDP program."""

__version__ = "0.1.0"
