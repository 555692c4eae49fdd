"""The vocabulary that every package shares: request types, results and errors.

This is the bottom of the dependency graph. It imports the standard library, numpy and pydantic
and nothing of this project, so that any process on the cluster can unpickle what it receives.
"""
