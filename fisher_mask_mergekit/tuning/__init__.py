"""Search of a recipe's coefficients on held-back training rows."""
