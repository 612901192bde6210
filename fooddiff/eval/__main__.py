"""`python -m fooddiff.eval`."""

from fooddiff.commands.eval import main

main()
