"""The command line: `tokenferry generate`, `verify` and `doctor`."""
