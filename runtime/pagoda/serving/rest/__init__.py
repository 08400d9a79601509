"""REST: routes, bodies, streams, and the way errors look in them."""
