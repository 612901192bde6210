"""`python -m fooddiff.report`."""

from fooddiff.commands.report import main

main()
