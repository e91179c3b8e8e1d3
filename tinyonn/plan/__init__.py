"""What work takes: of memory, of disk, of time. Pure but for what is asked of the machine."""
