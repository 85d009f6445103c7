"""Starting points for one's own data."""
