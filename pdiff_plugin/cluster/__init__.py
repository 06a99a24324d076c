"""All of Ray: joining or starting a cluster, and the fits, members, scores and searches that run on one."""
