"""Typed configuration and the Ray Serve application that binds the packages."""
