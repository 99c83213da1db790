"""The paper's experiments as commands, and the project's own evidence."""
