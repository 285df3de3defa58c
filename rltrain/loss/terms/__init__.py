"""Additive loss terms, unreduced. The objective applies the coefficient and the aggregate."""
