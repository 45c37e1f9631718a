"""The service's child processes: the GPU worker and its supervisor, and granian's web workers.

Outsiders import the names below, never a module of the package.
"""

from server.processes.listening import HostError, PortError, PortTakenError, addresses_of, hold_port
from server.processes.terminal import terminal_is_gone
from server.processes.tls import tls_problems
from server.processes.web_workers import WebServer
from server.processes.worker_supervisor import HUGE_PAGES, Supervisor

__all__ = [
    "HUGE_PAGES",
    "HostError",
    "PortError",
    "PortTakenError",
    "Supervisor",
    "WebServer",
    "addresses_of",
    "hold_port",
    "terminal_is_gone",
    "tls_problems",
]
