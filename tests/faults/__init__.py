"""Faults on real processes: children are killed, wires are cut, disks fill up, and an auditor looks at what is left."""
