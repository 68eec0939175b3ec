"""Traffic as data: which requests arrive when, for which model, how long."""
