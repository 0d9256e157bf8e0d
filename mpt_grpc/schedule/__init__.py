"""The control plane: which sequences run next and which own each block. Pure Python; uses no torch, clock or lock."""
