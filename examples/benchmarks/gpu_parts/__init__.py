"""The parts of `gpu.py`: a module each, and what they share."""
