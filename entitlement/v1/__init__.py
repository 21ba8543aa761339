"""Stubs generated from proto/entitlement/v1 by `make proto`; only this file is written by hand."""
