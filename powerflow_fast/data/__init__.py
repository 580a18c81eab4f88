"""Prompts and questions: the packaged ones, and reading those of users."""
