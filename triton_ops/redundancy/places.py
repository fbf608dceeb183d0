"""What stands for a place where there is none."""

NONE = -1
"""No other key repeats this one."""

UNSEEN = -2
"""The key was never compared, or its repeat is gone."""
