"""Calls of the web workers: models, voices, consents, outcomes, usage, caches and settings, and those not answered yet.

Outsiders import from this package only, never from its modules.
"""

from gpu_worker.control.handler import ControlHandler as ControlHandler
