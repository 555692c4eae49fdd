"""The frozen language model, and the engine that batches by cluster and applies the update."""
