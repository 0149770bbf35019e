"""Reads all of a data set again and compares it with its manifest, and with its sources."""
