"""The command lines: what their options mean, what they read, print and return."""
