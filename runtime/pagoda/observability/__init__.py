"""Metrics and logs. Stands below everything else: imports prometheus-client and the standard library."""
