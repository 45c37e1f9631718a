"""A reload: the main process reads the settings, the keys and the pronunciations anew, and every process takes them.

Outsiders import the names below, never a module of the package.
"""

from server.reload.configuration import TLS, Configuration
from server.reload.live_state import take_state
from server.reload.main_link import MainLink
from server.reload.main_process import Reloads
from server.reload.messages import AskReload, ReloadOutcome, WebState, no_main_process

__all__ = [
    "TLS",
    "AskReload",
    "Configuration",
    "MainLink",
    "ReloadOutcome",
    "Reloads",
    "WebState",
    "no_main_process",
    "take_state",
]
