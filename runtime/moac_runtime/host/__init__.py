"""What the host grants a process, and how a command behaves there."""
