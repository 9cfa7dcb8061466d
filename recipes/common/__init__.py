"""Data sets and models that the recipes share; nothing in `curvtrain` imports from here."""
