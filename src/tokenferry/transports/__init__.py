"""How rows travel: one file a transport, and `selection`, which picks."""
