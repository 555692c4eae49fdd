"""vLLM as a second engine: for models and features that the built-in one does not have."""
