"""The command line, one file a subcommand; ``training/__main__.py`` says which there are."""
