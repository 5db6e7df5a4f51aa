"""Kubernetes objects, and how they are listed and watched."""
