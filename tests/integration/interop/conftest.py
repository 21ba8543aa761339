"""The probe on each transport, and a way to talk to it."""

from __future__ import annotations
