"""Everything that touches an optimizer."""
