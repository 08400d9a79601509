"""Scheduling and KV accounting: which tokens run in the next step, and in which blocks.

`BlockPool` owns the blocks, a `BlockLease` owns the blocks of one request, `KVCacheManager` moves blocks between them and
knows prefixes, `Scheduler` decides. All of it runs in microseconds on a CPU and is tested by state machines in
`tests/property/`.
"""
