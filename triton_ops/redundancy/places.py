"""What stands for a place where there is none: less than any place."""

NONE = -1
"""No other key repeats this one."""

UNSEEN = -2
"""The key was never compared."""

GONE = -3
"""The key was compared, and the repeat that was found is no longer held."""
