"""Plans and packages as tables, pictures and a page."""
