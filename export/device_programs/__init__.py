"""Programs for devices."""
