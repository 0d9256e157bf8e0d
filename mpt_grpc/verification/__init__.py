"""Checks that a checkpoint is served correctly: its tokens, templates and log probabilities, beside references."""
