"""Defenses: what moves the truth. Training recipes live in ``mohs.defenses.training``."""
