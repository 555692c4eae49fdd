"""The front door: HTTP and handles, prompt embeddings, cluster assignment."""
