"""Tests, by what they need: unit, contract, model, integration, faults, security."""
