"""Presentation of scores: pages, tables and figures."""
