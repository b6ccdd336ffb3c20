"""Tools that look into a running model. Imports ops only."""
