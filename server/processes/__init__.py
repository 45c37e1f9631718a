"""The service's child processes: the GPU worker and its supervisor, and granian's web workers.

Outsiders import the names below, never a module of the package.
"""

from server.processes.listening import HostError as HostError
from server.processes.listening import PortError as PortError
from server.processes.listening import PortTakenError as PortTakenError
from server.processes.listening import addresses_of as addresses_of
from server.processes.listening import hold_port as hold_port
from server.processes.terminal import terminal_is_gone as terminal_is_gone
from server.processes.tls import tls_problems as tls_problems
from server.processes.web_workers import WebServer as WebServer
from server.processes.worker_supervisor import HUGE_PAGES as HUGE_PAGES
from server.processes.worker_supervisor import Supervisor as Supervisor
