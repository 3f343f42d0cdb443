"""Aligners: depth, width, heads, neurons, vocabularies."""
