"""tokenferry inside other libraries. Each module imports its host library; nothing here is imported by the package itself."""
