"""Devices, memory, processes and signals."""
