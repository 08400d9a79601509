"""API keys: who calls, what the caller may do, and whose requests they are.

key_files ──▶ keys ──▶ api_keys: the keys in force, read again when their file changes ──▶ `caller_var`
                            │
routes: what every REST route and every RPC asks of a caller;  attempts: unknown keys are answered slowly
"""
