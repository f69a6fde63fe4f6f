"""Trainers that record what an adapter's card tells, and save and push nothing but the adapter."""
