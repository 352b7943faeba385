"""How rows travel: one file a transport, and `select`, which picks."""
