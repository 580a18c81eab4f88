"""Prompts and questions: reading them, and those that come with the package."""
