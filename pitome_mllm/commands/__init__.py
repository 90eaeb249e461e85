"""One module per command of the command line; each offers `register(commands)` and `run(options)`."""
