"""One module per command of the command line; each offers `register(commands)` and `run(options)`.

What a user can mend is a `UserError`, before anything large is loaded where that is possible.
"""
