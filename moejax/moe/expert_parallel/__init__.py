"""Experts on several devices: how tokens and experts meet."""
