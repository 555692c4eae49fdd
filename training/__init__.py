"""Data, objectives, training jobs and honest evaluation of hypernetworks."""
