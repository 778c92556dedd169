"""Using a model: text from it."""
