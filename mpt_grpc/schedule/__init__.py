"""The control plane: who runs next and who owns which block. Pure Python, without torch, clock or lock."""
