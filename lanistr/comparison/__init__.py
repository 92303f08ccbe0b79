"""Comparisons and ablations: a grid of cells (method x labels x seed), each answered once, and tables of them."""
