"""What people look at: console tables, overlays, plots."""
