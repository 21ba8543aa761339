"""Stubs generated from proto/envoy by `make proto`; only this file is written by hand."""
