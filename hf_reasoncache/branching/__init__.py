"""Several branches of one problem: when each may stop, and what they decide together."""
