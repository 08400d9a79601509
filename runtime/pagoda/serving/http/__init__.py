"""HTTP mechanics that all routes share."""
