"""Swapping generated weights into a model and running many members as one."""
