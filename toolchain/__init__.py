"""What happens on the training machine, from a recipe to its report."""
