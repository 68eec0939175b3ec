"""The API process: HTTP on one side, unit processes on the other."""
