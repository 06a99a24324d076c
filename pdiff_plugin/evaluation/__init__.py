"""Judging: a user's task, the metrics, the baselines, the table and the verdict."""
