"""Texts in, statistics of activations out."""
