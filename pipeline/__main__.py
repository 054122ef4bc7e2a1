"""`python -m pipeline` is the command `dypo`."""

from pipeline.cli import main

main()
