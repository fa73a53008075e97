"""`python -m fedtail` is the command line."""

from fedtail.cli import main

main()
