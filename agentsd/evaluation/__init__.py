"""Evaluation that anyone can repeat: protocols, sharded and resumable generation, metrics, report."""
