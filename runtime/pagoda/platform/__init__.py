"""The machine: hardware, cgroups, cores, threads."""
