"""Hypernetworks, the low-rank update they generate, and its cache."""
