"""Where hot accounts live: one narrow protocol, an in-memory twin and Redis."""
