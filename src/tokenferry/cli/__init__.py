"""The command line: `tokenferry generate`, `verify`, `doctor` and `bench`."""
