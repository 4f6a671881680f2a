"""`python -m mmtok_cli`, for where the command itself is not on the path."""

from mmtok_cli.cli.main import main

main()
