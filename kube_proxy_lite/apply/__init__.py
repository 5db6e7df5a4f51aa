"""Appliers: what the renderers want, brought to the kernel."""
