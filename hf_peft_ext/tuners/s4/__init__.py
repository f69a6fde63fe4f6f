"""S4 (Chen et al. 2023): groups of layers, their sub-layers, and sizes solved from a budget."""
