"""Refines a plugged adapter: scales, zeroth-order steps, distillation."""
