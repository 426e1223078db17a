"""Backbones: known tokens and a class → conditions ``z``. A backbone knows no head."""
