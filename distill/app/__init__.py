"""The application: recipes, what they build, and the commands."""
