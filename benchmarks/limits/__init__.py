"""What the parts can do alone: a transport without a decision, a script without a gateway, rows without a ledger."""
