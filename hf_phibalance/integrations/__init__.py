"""
Integrations: φ-balancing in tools that people train with from a YAML or a command line. A module per tool, named where
that tool wants a name; none is imported here, since each imports its tool.
"""
