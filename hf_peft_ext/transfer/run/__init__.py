"""Runs plug-in transfer from end to end and records what was done."""
