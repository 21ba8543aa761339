"""The process that carries the hot journal into the ledger, and the ledger's news out."""
