"""T-Few's (IA)^3 (Liu et al. 2022), saved as peft's own type."""
