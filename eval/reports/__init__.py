"""What scores look like: pages, tables and figures."""
