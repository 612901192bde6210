"""`python -m fooddiff.bench`."""

from fooddiff.commands.bench import main

main()
