"""The published checkpoint format: its folder is read, checked and written here."""
