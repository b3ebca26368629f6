"""What the site needs besides Sphinx's own extensions."""
