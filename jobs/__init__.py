"""Commands: typed configs, the command line, Ray start-up, exit codes."""
