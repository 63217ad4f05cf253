"""YAML recipes, read into frozen pydantic models."""
