"""Faults and load, for real, on one running application with two tiny LM replicas."""
