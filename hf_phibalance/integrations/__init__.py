"""Integrations of training and serving tools. One module per tool; each imports its tool."""
