"""Adapters: one backend each, imported only when an environment names it."""
