"""One file per group of the CLI's commands: `add` puts them into the parser of captune/cli.py."""
