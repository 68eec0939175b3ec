"""Transformers as plain functions of their weights, over the kernels."""
