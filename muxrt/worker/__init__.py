"""What computes: runners on lanes, their memory, and the process of a unit."""
