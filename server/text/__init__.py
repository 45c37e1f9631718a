"""What a client's text means: what to speak, the pauses in it, and where each character stands in the input.

Pure functions: no I/O, no model and no audio. Outsiders import the names below, never a module of the package.
"""

from server.text.preparation import PreparedSegment, prepare

__all__ = ["PreparedSegment", "prepare"]
