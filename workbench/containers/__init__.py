"""Processes: from a specification to an exit code."""
