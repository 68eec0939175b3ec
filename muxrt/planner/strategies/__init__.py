"""The ways to place models, by the name that people call them by."""
