"""`python -m xdplb` is `xdplb`."""

from xdplb.cli.commands import main

main()
