"""`python -m services.cli`: the operator's command line."""

from services.cli.main import main

main()
