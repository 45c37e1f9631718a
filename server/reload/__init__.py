"""A reload: the main process reads the settings, the keys and the pronunciations anew, and every process takes them.

Outsiders import the names below, never a module of the package.
"""

from server.reload.configuration import TLS as TLS
from server.reload.configuration import Configuration as Configuration
from server.reload.live_state import take_state as take_state
from server.reload.main_link import MainLink as MainLink
from server.reload.main_process import Reloads as Reloads
from server.reload.messages import AskReload as AskReload
from server.reload.messages import ReloadOutcome as ReloadOutcome
from server.reload.messages import WebState as WebState
from server.reload.messages import no_main_process as no_main_process
