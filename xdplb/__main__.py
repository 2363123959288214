"""`python -m xdplb` is `xdplb`."""

from xdplb.cli import main

main()
