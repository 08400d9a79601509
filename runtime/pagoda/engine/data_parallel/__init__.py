"""Several engine replicas behind one client."""
