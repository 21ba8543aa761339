"""What the gateway and the ledger agree on: pure values and rules, without I/O, asyncio or a clock."""
