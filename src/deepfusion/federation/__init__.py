"""Devices on machines of their own: Flower carries one order to each and its upload back; no phase can tell."""
