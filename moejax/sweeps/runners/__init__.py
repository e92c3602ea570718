"""Who trains the arms of a sweep: this process, a pool of processes, jobs of a cluster."""
