"""Bridges: small models on which an adapter for the large one is trained."""
