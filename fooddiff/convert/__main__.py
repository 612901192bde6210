"""`python -m fooddiff.convert`."""

from fooddiff.commands.convert import main

main()
