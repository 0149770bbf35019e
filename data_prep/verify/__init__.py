"""Reads a whole data set again and compares it with its manifest and its sources."""
