"""Every entry point: each composes objects from `build` and talks to the terminal. `flags` are shared."""
