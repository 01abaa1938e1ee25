"""Inference: depth maps of photographs, folders and videos."""
