"""`python -m bigtrain.cli`."""

from bigtrain.cli import main

main()
