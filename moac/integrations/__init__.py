"""Plans run by other libraries, where people already work."""
