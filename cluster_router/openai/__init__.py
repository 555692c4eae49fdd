"""The OpenAI-compatible API: protocol, conversion and streaming over a plain service object."""
