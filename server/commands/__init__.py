"""The command line: one module a command, with `add_arguments(parser)` and `run(arguments) -> exit code`.

server/__main__.py finds the command; the commands share client.py and output.py.
"""
