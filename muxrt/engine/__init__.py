"""The brain's outer ring: unit, router, messages, and the seam to what computes."""
