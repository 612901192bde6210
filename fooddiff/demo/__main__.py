"""`python -m fooddiff.demo`."""

from fooddiff.commands.demo import main

main()
