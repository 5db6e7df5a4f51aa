"""The service proxy: Kubernetes Services as rules of this node's kernel."""
