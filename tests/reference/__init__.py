"""Naive oracles: loops and textbook formulas that the package's code is compared with."""
