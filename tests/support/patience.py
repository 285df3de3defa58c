"""How long a test waits for what it does not expect to wait for."""

from __future__ import annotations

PATIENCE = 120.0
"""Seconds in which no loaded machine fails to do what takes a moment. What must not be waited for (a sleep, a
deadline) is longer: a bound near what an idle machine needs measures the machine.
"""
