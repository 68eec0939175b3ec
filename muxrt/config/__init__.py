"""Typed, frozen configuration; an unknown key is an error."""
