"""From raw tables, text, images and series to a gold dataset. Never imports torch."""
