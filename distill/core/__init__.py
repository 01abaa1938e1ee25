"""What everything shares: depth maps and their kinds, alignment, crops, labels, plug-ins, files."""
