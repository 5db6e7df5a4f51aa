"""The per-node daemon: allocates pod addresses from the node's blocks and plumbs them into the kernel."""
