"""Built-in URL schemes: one file for each scheme, named after it."""
