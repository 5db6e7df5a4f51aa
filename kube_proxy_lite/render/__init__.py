"""Renderers: desired Services → what a kernel interface takes. Pure."""
